/*
 * Objects that several processes share, and everybody who can change them.
 *
 * Three processes obey: "outsider" is the one that the harness started, "target" its child, the one
 * to watch, and "child" that one's. A command line begins with who is meant; what follows is done
 * by that process alone, and answered when done, so that nobody but a "busy" thread ever writes
 * unasked. All three have the view "anon", 16 pages of anonymous shared memory.
 *
 * Objects and views (mappings) have names, which are inherited by fork. Pages count from the start
 * of the object, not of the view. Answers are "ok", sometimes with a number, or "bad".
 *   fork                            the next process down the line; its number
 *   memfd NAME pages                a memfd that can be sealed; its descriptor
 *   file NAME PATH pages            a new file; its descriptor
 *   sysv NAME pages [id]            a System V segment that goes with its last user; its id
 *   isolate                         go to an IPC namespace of one's own
 *   open NAME PATH · attach NAME ID the same object, by a descriptor of one's own
 *   look NAME PATH                  the same, for reading only
 *   close NAME · inode NAME         its number
 *   map VIEW NAME page count rw|ro|private    its address; System V is attached whole
 *   unmap VIEW
 *   store VIEW page count seed      a pattern into memory, zeros for seed 0
 *   load VIEW page count            read a byte of each page
 *   pwrite NAME page count seed     a pattern through the descriptor
 *   truncate NAME pages · punch NAME page count · allocate NAME page count
 *   remove VIEW page count          MADV_REMOVE
 *   seal NAME seals                 F_ADD_SEALS
 *   busy store VIEW | pwrite NAME | churn NAME VIEW | flip NAME NAME
 *       a thread that goes on until "rest"; the address of the number of turns done: count up in the first word of every page in turn, in
 *       memory or through the descriptor; fill, punch, shrink and regrow an object; map two
 *       objects in turn at one address
 *   rest
 */
#include "target.h"

#include <sched.h>
#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>

#define PAGES 16
#define MAX_NAMES 32
#define MAX_WORDS 8
#define LINE 512
#define FLIP_PLACE ((char *)0x200000000)

static const char *const roles[] = { "outsider", "target", "child" };
static int role;
static int below = -1; /* the socket of the next process */
static long result;    /* what the answer has besides "ok" */

static struct object {
	char name[24];
	int fd, id; /* -1: it has none */
} objects[MAX_NAMES];

static struct view {
	char name[24];
	char *at;
	size_t page, pages;
	bool sysv;
} views[MAX_NAMES];

static struct object *object(const char *name)
{
	for (int i = 0; i < MAX_NAMES; i++)
		if (!strcmp(objects[i].name, name))
			return &objects[i];
	return NULL;
}

static struct view *view(const char *name)
{
	for (int i = 0; i < MAX_NAMES; i++)
		if (!strcmp(views[i].name, name))
			return &views[i];
	return NULL;
}

static bool enter_object(const char *name, int fd, int id)
{
	struct object *o = object(name) ? NULL : object("");

	if (!o || (fd < 0 && id < 0))
		return false;
	*o = (struct object){ .fd = fd, .id = id };
	snprintf(o->name, sizeof(o->name), "%s", name);
	result = fd < 0 ? id : fd;
	return true;
}

static bool enter_view(const char *name, void *at, size_t page, size_t pages, bool sysv)
{
	struct view *v = view(name) ? NULL : view("");

	if (!v || at == MAP_FAILED)
		return false;
	*v = (struct view){ .at = at, .page = page, .pages = pages, .sysv = sysv };
	snprintf(v->name, sizeof(v->name), "%s", name);
	result = (long)at;
	return true;
}

/* --- objects --- */

static bool sized(int fd, const char *pages)
{
	return fd >= 0 && !ftruncate(fd, strtol(pages, NULL, 0) * PAGE);
}

static bool do_memfd(char **w)
{
	int fd = memfd_create(w[0], MFD_CLOEXEC | MFD_ALLOW_SEALING);

	return sized(fd, w[1]) && enter_object(w[0], fd, -1);
}

static bool do_file(char **w)
{
	int fd = open(w[1], O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);

	return sized(fd, w[2]) && enter_object(w[0], fd, -1);
}

static bool do_sysv(char **w)
{
	if (w[2][0]) { /* the kernel gives this number next, where it can restore checkpoints */
		int fd = open("/proc/sys/kernel/shm_next_id", O_WRONLY | O_CLOEXEC);
		bool asked = fd >= 0 && write(fd, w[2], strlen(w[2])) > 0;

		close(fd);
		if (!asked)
			return false;
	}
	return enter_object(w[0], -1, shmget(IPC_PRIVATE, atol(w[1]) * PAGE, IPC_CREAT | 0600));
}

static bool do_isolate(char **w)
{
	(void)w;
	return !unshare(CLONE_NEWIPC);
}

static bool do_open(char **w)
{
	return enter_object(w[0], open(w[1], O_RDWR | O_CLOEXEC), -1);
}

static bool do_look(char **w)
{
	return enter_object(w[0], open(w[1], O_RDONLY | O_CLOEXEC), -1);
}

static bool do_attach(char **w)
{
	return enter_object(w[0], -1, atoi(w[1]));
}

static bool do_close(char **w)
{
	struct object *o = object(w[0]);
	bool done = o && (o->fd < 0 || !close(o->fd));

	if (done)
		o->name[0] = 0;
	return done;
}

static bool do_inode(char **w)
{
	struct object *o = object(w[0]);
	struct stat about;

	if (!o || fstat(o->fd, &about))
		return false;
	result = (long)about.st_ino;
	return true;
}

static bool do_truncate(char **w)
{
	struct object *o = object(w[0]);

	return o && sized(o->fd, w[1]);
}

static bool change(char **w, int mode)
{
	struct object *o = object(w[0]);

	return o && !fallocate(o->fd, mode, atol(w[1]) * PAGE, atol(w[2]) * PAGE);
}

static bool do_punch(char **w)
{
	return change(w, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE);
}

static bool do_allocate(char **w)
{
	return change(w, 0);
}

static bool do_seal(char **w)
{
	struct object *o = object(w[0]);

	return o && !fcntl(o->fd, F_ADD_SEALS, atoi(w[1]));
}

static bool do_pwrite(char **w)
{
	static char words[PAGE] __attribute__((aligned(PAGE)));
	struct object *o = object(w[0]);
	size_t page = atol(w[1]), end = page + atol(w[2]);

	for (; o && page < end; page++) {
		memset(words, 0, PAGE);
		if (atol(w[3]))
			pattern_write(words, atol(w[3]), page);
		if (pwrite(o->fd, words, PAGE, page * PAGE) != (ssize_t)PAGE)
			return false;
	}
	return o;
}

/* --- views --- */

static bool do_map(char **w)
{
	struct object *o = object(w[1]);
	size_t page = atol(w[2]), pages = atol(w[3]);
	int prot = strcmp(w[4], "ro") ? PROT_READ | PROT_WRITE : PROT_READ;
	int flags = strcmp(w[4], "private") ? MAP_SHARED : MAP_PRIVATE;
	void *at = MAP_FAILED;

	if (o && o->fd >= 0)
		at = mmap(NULL, pages * PAGE, prot, flags, o->fd, page * PAGE);
	else if (o)
		at = shmat(o->id, NULL, prot & PROT_WRITE ? 0 : SHM_RDONLY);
	if (o && o->id >= 0)
		shmctl(o->id, IPC_RMID, NULL); /* it can be attached still, as long as it is */
	return enter_view(w[0], at, page, pages, o && o->fd < 0);
}

static bool do_unmap(char **w)
{
	struct view *v = view(w[0]);
	bool done = v && !(v->sysv ? shmdt(v->at) : munmap(v->at, v->pages * PAGE));

	if (done)
		v->name[0] = 0;
	return done;
}

/* The address of pages of a view, or NULL where it does not have them all. */
static char *within(char **w)
{
	struct view *v = view(w[0]);
	size_t page = atol(w[1]), count = atol(w[2]);

	if (!v || page < v->page || page + count > v->page + v->pages)
		return NULL;
	return v->at + (page - v->page) * PAGE;
}

static bool do_store(char **w)
{
	char *at = within(w);

	for (long i = 0; at && i < atol(w[2]); i++)
		if (atol(w[3]))
			pattern_write(at + i * PAGE, atol(w[3]), atol(w[1]) + i);
		else
			memset(at + i * PAGE, 0, PAGE);
	return at;
}

static bool do_load(char **w)
{
	char *at = within(w);

	for (long i = 0; at && i < atol(w[2]); i++)
		(void)*(volatile char *)(at + i * PAGE);
	return at;
}

static bool do_remove(char **w)
{
	char *at = within(w);

	return at && !madvise(at, atol(w[2]) * PAGE, MADV_REMOVE);
}

/* --- a thread that changes things unasked --- */

static struct busy {
	pthread_t thread;
	char how;
	struct object *a, *b;
	struct view *view;
	volatile bool going, failed;
	volatile uint64_t turns; /* in private memory */
} busy;

static bool count_up(uint64_t turn)
{
	for (size_t p = 0; p < PAGES; p++)
		if (busy.how == 's')
			*(volatile uint64_t *)(busy.view->at + p * PAGE) = turn;
		else if (pwrite(busy.a->fd, &turn, sizeof(turn), p * PAGE) != sizeof(turn))
			return false;
	return true;
}

static bool churn(uint64_t turn)
{
	int fd = busy.a->fd, punch = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;

	for (size_t p = turn % 3; p < PAGES; p += 2)
		*(volatile uint64_t *)(busy.view->at + p * PAGE + turn % PAGE / 8 * 8) = turn;
	return !fallocate(fd, punch, turn % PAGES * PAGE, 2 * PAGE) &&
	       !ftruncate(fd, turn % PAGES * PAGE) && !ftruncate(fd, PAGES * PAGE);
}

static bool flip(uint64_t turn)
{
	int fd = turn % 2 ? busy.a->fd : busy.b->fd, flags = MAP_SHARED | MAP_FIXED | MAP_POPULATE;

	return mmap(FLIP_PLACE, PAGES * PAGE, PROT_READ | PROT_WRITE, flags, fd, 0) != MAP_FAILED &&
	       (turn % 8 || !munmap(FLIP_PLACE, PAGES * PAGE));
}

static void *be_busy(void *unused)
{
	bool (*step)(uint64_t) = busy.how == 'c' ? churn : busy.how == 'f' ? flip : count_up;

	(void)unused;
	for (uint64_t turn = 1; busy.going && !busy.failed; turn++) {
		busy.failed = !step(turn);
		busy.turns = turn;
	}
	return NULL;
}

static bool do_busy(char **w)
{
	busy = (struct busy){ .how = w[0][0], .going = true };
	busy.a = object(w[1]);
	busy.view = view(busy.how == 's' ? w[1] : w[2]);
	busy.b = object(w[2]);
	if (strchr("sc", busy.how) && !busy.view)
		return false;
	if (strchr("pcf", busy.how) && !busy.a)
		return false;
	if ((busy.how == 'f' && !busy.b) || pthread_create(&busy.thread, NULL, be_busy, NULL))
		return false;
	while (!busy.turns)
		sched_yield();
	result = (long)&busy.turns;
	return !busy.failed;
}

static bool do_rest(char **w)
{
	(void)w;
	busy.going = false;
	return !pthread_join(busy.thread, NULL) && !busy.failed;
}

/* --- who does what --- */

static bool do_fork(char **w);

static const struct verb {
	const char *name;
	bool (*call)(char **);
	int words;
} verbs[] = {
	{ "fork", do_fork, 0 },	    { "memfd", do_memfd, 2 },	    { "file", do_file, 3 },
	{ "sysv", do_sysv, 2 },	    { "open", do_open, 2 },	    { "attach", do_attach, 2 },
	{ "close", do_close, 1 },   { "inode", do_inode, 1 },	    { "map", do_map, 5 },
	{ "unmap", do_unmap, 1 },   { "store", do_store, 4 },	    { "load", do_load, 3 },
	{ "pwrite", do_pwrite, 4 }, { "truncate", do_truncate, 2 }, { "punch", do_punch, 3 },
	{ "remove", do_remove, 3 }, { "allocate", do_allocate, 3 }, { "seal", do_seal, 2 },
	{ "busy", do_busy, 2 },	    { "rest", do_rest, 0 },	    { "isolate", do_isolate, 0 },
	{ "look", do_look, 2 },
};

static void perform(char *rest, char *answer)
{
	char *words[MAX_WORDS + 1], *verb = strtok(rest, " "), *word;
	int count = 0;

	for (int i = 0; i <= MAX_WORDS; i++)
		words[i] = "";
	while (count < MAX_WORDS && (word = strtok(NULL, " ")))
		words[count++] = word;
	snprintf(answer, LINE, "bad verb");
	for (size_t i = 0; verb && i < sizeof(verbs) / sizeof(verbs[0]); i++) {
		if (strcmp(verb, verbs[i].name) || count < verbs[i].words)
			continue;
		errno = 0;
		result = 0;
		if (verbs[i].call(words))
			snprintf(answer, LINE, "ok %ld", result);
		else
			snprintf(answer, LINE, "bad %s", strerror(errno));
	}
}

static void obey(char *line, char *answer)
{
	size_t length = strcspn(line, " ");

	if (strlen(roles[role]) == length && !strncmp(line, roles[role], length))
		return perform(line + length, answer);
	snprintf(answer, LINE, "bad nobody");
	if (below >= 0 && send(below, line, strlen(line) + 1, 0) > 0 &&
	    recv(below, answer, LINE, 0) <= 0)
		snprintf(answer, LINE, "bad it is gone");
}

/* Of the next process: everything comes from above, and ends with what is above. */
static void serve(int above)
{
	char line[LINE], answer[LINE];

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	signal(SIGTERM, SIG_DFL);
	role++;
	below = -1;
	while (recv(above, line, sizeof(line), 0) > 0) {
		obey(line, answer);
		if (send(above, answer, strlen(answer) + 1, 0) < 0)
			break;
	}
	_exit(0);
}

static bool do_fork(char **w)
{
	int ends[2];

	(void)w;
	if (below >= 0 || role == 2 || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends))
		return false;
	pid_t pid = fork();
	if (pid == 0) {
		close(ends[0]);
		serve(ends[1]);
	}
	close(ends[1]);
	below = ends[0];
	result = pid;
	return pid > 0;
}

int main(int argc, char **argv)
{
	static struct text text;
	char line[LINE], answer[LINE];
	int flags = MAP_SHARED | MAP_ANONYMOUS;

	target_begin(argc, argv);
	void *anon = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
	if (!enter_view("anon", anon, 0, PAGES, false) || !do_fork(NULL))
		die("set-up");
	put(&text, "{\"pid\": %ld, \"anon\": %lu}", result, (uint64_t)anon);
	say_ready(&text);
	while (target_command(line, sizeof(line))) {
		obey(line, answer);
		say("%s", answer);
	}
	return 0;
}
