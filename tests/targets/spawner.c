/*
 * Children that fault pages at once, before any watcher could have been told about them.
 *
 * Every child stores pattern(seed, page) to `pages` pages of an area that it inherited and of a
 * new one of its own, reports, and waits for SIGTERM, on which it checks them. The parent's copy
 * of the inherited area keeps pattern 1.
 * Commands, answered by a JSON list of the children:
 *   fork N PAGES           N children
 *   threads N PAGES T      N children, each with T threads that share the storing
 *   tree N PAGES           a child, its child, and so on, N deep
 *   vfork N PAGES          vfork and exec of this program: no inherited area
 *   clonevm PAGES          one process in the same memory: "fresh" is visible here too
 * and, answered by ok or bad: reap (SIGTERM to all, each must find its pages right).
 */
#include "target.h"

#include <sched.h>

#define INHERITED_PAGES 1024
#define MAX_CHILDREN 256
#define MAX_THREADS 32

static char *inherited;
static pid_t children[MAX_CHILDREN], sharer;
static int count;
static char *shared_pages;
static long shared_count;
static long next_seed = 2;
static int report_ends[2];

struct job {
	char *at[2]; /* where to store: inherited (or NULL) and fresh */
	long pages, seed, first, step;
	bool done;
};

static void *store_pages(void *arg)
{
	struct job *job = arg;

	for (long page = job->first; page < job->pages; page += job->step)
		for (int i = 0; i < 2; i++)
			if (job->at[i])
				pattern_write(job->at[i] + page * PAGE, job->seed, page);
	return NULL;
}

static bool pages_hold(const char *at, long seed, long pages)
{
	for (long page = 0; at && page < pages; page++)
		if (!pattern_holds(at + page * PAGE, seed, page)) {
			fprintf(stderr, "%d: page %ld at %p is not of seed %ld\n", getpid(), page,
				(const void *)(at + page * PAGE), seed);
			return false;
		}
	return true;
}

/* The life of a child after it reported; `child` is its own, if it has one. */
_Noreturn static void wait_and_check(const struct job *job, pid_t child)
{
	int status = 0;

	while (!target_terminated)
		poll(NULL, 0, 100);
	if (child) {
		kill(child, SIGTERM);
		waitpid(child, &status, 0);
	}
	bool good = pages_hold(job->at[0], job->seed, job->pages) &&
		    pages_hold(job->at[1], job->seed, job->pages);
	_exit(good && status == 0 ? 0 : 1);
}

static void report(int fd, const struct job *job)
{
	/* Shorter than PIPE_BUF: reports of several children do not mix. */
	dprintf(fd,
		"{\"pid\": %d, \"ppid\": %d, \"seed\": %ld, \"pages\": %ld, \"inherited\": %lu, "
		"\"fresh\": %lu}\n",
		getpid(), getppid(), job->seed, job->pages, (uint64_t)job->at[0],
		(uint64_t)job->at[1]);
}

/* In the child. Threads stay alive, so that there is more than one to be stopped. */
static void *store_and_stay(void *arg)
{
	store_pages(arg);
	__atomic_store_n(&((struct job *)arg)->done, true, __ATOMIC_RELEASE);
	for (;;)
		pause();
	return NULL;
}

static struct job store_and_report(char *from_parent, long pages, long seed, int threads)
{
	struct job job = { .at = { from_parent, NULL }, .pages = pages, .seed = seed, .step = 1 };
	static struct job jobs[MAX_THREADS];

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	job.at[1] = map_anon(pages * PAGE);
	for (int i = 0; i < threads; i++) {
		pthread_t thread;

		jobs[i] = job;
		jobs[i].first = i;
		jobs[i].step = threads;
		if (pthread_create(&thread, NULL, store_and_stay, &jobs[i]))
			_exit(2);
	}
	for (int i = 0; i < threads; i++)
		while (!__atomic_load_n(&jobs[i].done, __ATOMIC_ACQUIRE))
			sched_yield();
	if (!threads)
		store_pages(&job);
	report(report_ends[1], &job);
	return job;
}

/* One child, or a line of `depth` of them. */
_Noreturn static void child_main(char *from_parent, long pages, long seed, int threads, int depth)
{
	struct job job;
	pid_t child;

	do { /* only the newest goes round again */
		job = store_and_report(from_parent, pages, seed++, threads);
		child = --depth > 0 ? fork() : 1;
	} while (child == 0);
	wait_and_check(&job, depth > 0 ? child : 0);
}

/* Entered by exec: PROGRAM --child FD PAGES SEED. */
_Noreturn static void exec_main(char **argv)
{
	struct sigaction act = { .sa_handler = target_on_term };
	struct job job = { .pages = atol(argv[3]), .seed = atol(argv[4]), .step = 1 };

	target_argv = argv;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	sigaction(SIGTERM, &act, NULL);
	job.at[1] = map_anon(job.pages * PAGE);
	store_pages(&job);
	report(atoi(argv[2]), &job);
	wait_and_check(&job, 0);
}

static pid_t vfork_and_exec(long pages, long seed)
{
	char fd[16], count_text[24], seed_text[24];
	char *argv[] = { target_argv[0], "--child", fd, count_text, seed_text, NULL };

	snprintf(fd, sizeof(fd), "%d", report_ends[1]);
	snprintf(count_text, sizeof(count_text), "%ld", pages);
	snprintf(seed_text, sizeof(seed_text), "%ld", seed);
	pid_t child = vfork();
	if (child == 0) {
		execv("/proc/self/exe", argv);
		_exit(2);
	}
	return child;
}

/* Shares the memory and even the thread area of the parent: nothing but stores and system calls. */
static int sharer_main(void *arg)
{
	struct job *job = arg;

	store_pages(job);
	__atomic_store_n(&job->done, true, __ATOMIC_RELEASE);
	for (;;)
		syscall(SYS_pause);
	return 0;
}

static void spawn_sharer(long pages)
{
	static char stack[65536] __attribute__((aligned(16)));
	static struct job job;

	if (sharer || pages < 1 || pages > INHERITED_PAGES)
		return say("bad");
	shared_pages = map_anon(pages * PAGE);
	shared_count = pages;
	job = (struct job){ .at = { NULL, shared_pages }, .pages = pages, .seed = 1000, .step = 1 };
	sharer = clone(sharer_main, stack + sizeof(stack), CLONE_VM | SIGCHLD, &job);
	if (sharer < 0)
		die("clone");
	while (!__atomic_load_n(&job.done, __ATOMIC_ACQUIRE))
		sched_yield();
	say("[{\"pid\": %d, \"ppid\": %d, \"seed\": 1000, \"pages\": %ld, \"inherited\": 0, "
	    "\"fresh\": %lu}]",
	    sharer, getpid(), pages, (uint64_t)shared_pages);
}

static void say_reports(int expected)
{
	static struct text text;
	int lines = 0;
	char byte;

	text.length = 0;
	put(&text, "[");
	while (lines < expected && read(report_ends[0], &byte, 1) == 1) {
		if (byte != '\n')
			put(&text, "%c", byte);
		else if (++lines < expected)
			put(&text, ", ");
	}
	put(&text, "]");
	say("%s", text.bytes);
}

static void spawn(const char *verb, int n, long pages, int threads)
{
	int processes = strcmp(verb, "tree") ? n : 1;

	if (n < 1 || pages < 1 || pages > INHERITED_PAGES || threads > MAX_THREADS ||
	    count + processes > MAX_CHILDREN)
		return say("bad");
	for (int i = 0; i < processes; i++) {
		long seed = next_seed++;
		pid_t child = strcmp(verb, "vfork") ? fork() : vfork_and_exec(pages, seed);

		if (child == 0)
			child_main(inherited, pages, seed, threads, processes < n ? n : 1);
		if (child < 0)
			die(verb);
		children[count++] = child;
	}
	next_seed += n;
	say_reports(n);
}

static bool reap(void)
{
	bool good = true;
	int status;

	for (int i = 0; i < count; i++)
		kill(children[i], SIGTERM);
	for (int i = 0; i < count; i++)
		good &= waitpid(children[i], &status, 0) == children[i] && status == 0;
	count = 0;
	if (sharer) {
		kill(sharer, SIGKILL);
		waitpid(sharer, NULL, 0);
		good &= pages_hold(shared_pages, 1000, shared_count);
		munmap(shared_pages, shared_count * PAGE);
		sharer = 0;
	}
	return good && pages_hold(inherited, 1, INHERITED_PAGES);
}

int main(int argc, char **argv)
{
	struct job job = { .pages = INHERITED_PAGES, .seed = 1, .step = 1 };
	static struct text text;
	char line[256];

	if (argc == 5 && !strcmp(argv[1], "--child"))
		exec_main(argv);
	target_begin(argc, argv);
	job.at[0] = inherited = map_anon(INHERITED_PAGES * PAGE);
	store_pages(&job);
	if (pipe(report_ends)) /* inherited across exec on purpose */
		die("pipe");
	put(&text, "{\"pid\": %d, \"inherited\": %lu, \"pages\": %d}", getpid(),
	    (uint64_t)inherited, INHERITED_PAGES);
	say_ready(&text);
	while (target_command(line, sizeof(line))) {
		char verb[16] = "";
		int n = 0, threads = 0;
		long pages = 0;

		sscanf(line, "%15s %d %ld %d", verb, &n, &pages, &threads);
		if (!strcmp(verb, "reap"))
			say("%s", reap() ? "ok" : "bad");
		else if (!strcmp(verb, "clonevm"))
			spawn_sharer(n);
		else if (!strcmp(verb, "fork") || !strcmp(verb, "threads") ||
			 !strcmp(verb, "tree") || !strcmp(verb, "vfork"))
			spawn(verb, n, pages, threads);
		else
			say("bad");
	}
	return reap() ? 0 : 1;
}
