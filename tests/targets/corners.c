/*
 * A process in one uncommon condition, which tells whether anything has disturbed it.
 *
 * Option: --in NAME, see `conditions`. Commands: check, go (what that means, the condition says).
 * Whatever the condition, no signal may arrive, no timer change and no child be noticed.
 */
#include "target.h"

#include <linux/filter.h>
#include <linux/io_uring.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <ucontext.h>

#define HOUR 3600
#define NOBODY 65534
#define SMALL_STACK 32768
#define QUEUED 3

struct condition {
	const char *name;
	void (*enter)(void); /* comes to serve() in the end */
	bool (*holds)(void);
	bool (*go)(void);
};

static const struct condition *condition;
static volatile sig_atomic_t strays, stray;
static timer_t timer;
static stack_t signal_stack;
static volatile long turns;
static volatile pid_t other;

_Noreturn static void serve(void);

static void fail(const char *what)
{
	fprintf(stderr, "%s: %s\n", condition->name, what);
}

/* --- what holds in every condition --- */

static void on_stray(int signal)
{
	strays++;
	stray = signal;
}

static void expect_no_signals(void)
{
	struct sigaction act = { .sa_handler = on_stray };

	for (int signal = 1; signal <= SIGRTMAX; signal++)
		if (signal != SIGTERM && signal != SIGPIPE && signal != SIGSEGV &&
		    signal != SIGABRT && signal != SIGTSTP)
			sigaction(signal, &act, NULL); /* fails for those that cannot be caught */
}

static void start_timers(void)
{
	struct itimerval each = { { HOUR, 0 }, { HOUR, 0 } };
	struct itimerspec at = { { HOUR, 0 }, { HOUR, 0 } };

	for (int which = ITIMER_REAL; which <= ITIMER_PROF; which++)
		if (setitimer(which, &each, NULL))
			die("setitimer");
	if (timer_create(CLOCK_MONOTONIC, NULL, &timer) || timer_settime(timer, 0, &at, NULL))
		die("timer_create");
}

static bool timers_hold(void)
{
	struct itimerspec at;
	struct itimerval each;
	bool good = true;

	for (int which = ITIMER_REAL; which <= ITIMER_PROF; which++)
		good &= !getitimer(which, &each) && each.it_interval.tv_sec == HOUR &&
			each.it_value.tv_sec > 0;
	return good && !timer_gettime(timer, &at) && at.it_interval.tv_sec == HOUR &&
	       at.it_value.tv_sec > 0 && timer_getoverrun(timer) == 0;
}

static bool check(void)
{
	bool good = !strays && timers_hold() && (!condition->holds || condition->holds());

	if (strays)
		fprintf(stderr, "%d stray signals, the last %d\n", (int)strays, (int)stray);
	if (!good)
		fail("disturbed");
	return good;
}

static pthread_t start(void *(*run)(void *), const pthread_attr_t *how)
{
	pthread_t thread;

	errno = pthread_create(&thread, how, run, NULL);
	if (errno)
		die("pthread_create");
	return thread;
}

static void *serve_in_thread(void *unused)
{
	(void)unused;
	serve();
}

/* --- sandboxes: userfaultfd is forbidden --- */

static void sandbox(uint32_t verdict)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, verdict),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { sizeof(code) / sizeof(code[0]), code };

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
	    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
		die("seccomp");
	serve();
}

static void enter_seccomp_errno(void)
{
	sandbox(SECCOMP_RET_ERRNO | EPERM);
}

static void enter_seccomp_kill(void)
{
	sandbox(SECCOMP_RET_KILL_PROCESS);
}

static void enter_seccomp_trap(void)
{
	sandbox(SECCOMP_RET_TRAP);
}

static bool still_forbidden(void)
{
	return syscall(SYS_userfaultfd, 0) == -1 && errno == EPERM;
}

/* --- namespaces and users --- */

static void enter_mount_namespace(void)
{
	if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
	    mount("none", "/mnt", "tmpfs", 0, NULL) || chroot("/mnt") || chdir("/"))
		die("mount namespace");
	serve();
}

static void enter_user_namespace(void)
{
	if (unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS))
		die("user namespace");
	serve();
}

/* The watched process is the child, which has number 1 there. */
static void enter_pid_namespace(void)
{
	int status;

	if (unshare(CLONE_NEWPID))
		die("PID namespace");
	pid_t child = fork();
	if (child < 0)
		die("fork");
	if (child == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		start_timers(); /* are not inherited */
		serve();
	}
	while (waitpid(child, &status, 0) != child)
		;
	_exit(WIFEXITED(status) ? WEXITSTATUS(status) : 1);
}

static void enter_nobody(void)
{
	if (setresgid(NOBODY, NOBODY, NOBODY) || setresuid(NOBODY, NOBODY, NOBODY))
		die("setresuid");
	serve();
}

/* --- a full descriptor table; hard limit above the soft one, or not --- */

static int highest;

static void fill_table(rlim_t hard)
{
	struct rlimit limit = { 40, hard };
	int fd;

	if (setrlimit(RLIMIT_NOFILE, &limit))
		die("setrlimit");
	while ((fd = dup(target_out)) >= 0)
		highest = fd;
	serve();
}

static void enter_full_table(void)
{
	fill_table(100);
}

static void enter_full_table_hard(void)
{
	fill_table(40);
}

static void enter_full_table_nobody(void)
{
	struct rlimit limit = { 40, 100 };

	if (setrlimit(RLIMIT_NOFILE, &limit))
		die("setrlimit");
	while ((highest = dup(target_out)) >= 0)
		;
	highest = 39;
	enter_nobody();
}

static bool still_full(void)
{
	return dup(target_out) == -1 && errno == EMFILE && highest == 39;
}

/* --- signals --- */

static void serve_in_handler(int signal)
{
	(void)signal;
	serve();
}

static void enter_handler_with(int flags)
{
	struct sigaction act = { .sa_handler = serve_in_handler, .sa_flags = flags };

	sigaction(SIGUSR1, &act, NULL);
	raise(SIGUSR1);
}

static void enter_handler(void)
{
	enter_handler_with(0);
}

static void enter_alternate_stack(void)
{
	signal_stack = (stack_t){ .ss_sp = map_anon(1 << 16), .ss_size = 1 << 16 };
	if (sigaltstack(&signal_stack, NULL))
		die("sigaltstack");
	enter_handler_with(SA_ONSTACK);
}

static bool on_alternate_stack(void)
{
	stack_t now;

	return !sigaltstack(NULL, &now) && now.ss_sp == signal_stack.ss_sp &&
	       now.ss_size == signal_stack.ss_size && now.ss_flags == SS_ONSTACK;
}

static void enter_pending(void)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	sigaddset(&set, SIGRTMIN);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	pthread_kill(pthread_self(), SIGUSR2);
	for (int i = 0; i < QUEUED; i++)
		if (sigqueue(getpid(), SIGRTMIN, (union sigval){ .sival_int = 100 + i }))
			die("sigqueue");
	serve();
}

/* Takes them, so it can be asked only once. */
static bool all_came(void)
{
	static bool taken;
	siginfo_t info;
	sigset_t set;
	bool good = true;

	if (taken)
		return true;
	taken = true;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN);
	for (int i = 0; i < QUEUED; i++)
		good &= sigtimedwait(&set, &info, &(struct timespec){ 0 }) == SIGRTMIN &&
			info.si_code == SI_QUEUE && info.si_value.sival_int == 100 + i;
	sigaddset(&set, SIGUSR2);
	return good && sigtimedwait(&set, &info, &(struct timespec){ 0 }) == SIGUSR2 &&
	       info.si_code == SI_USER && sigtimedwait(&set, &info, &(struct timespec){ 0 }) < 0;
}

/* --- threads and stacks --- */

static char *small_stack;

static void *stay(void *unused)
{
	(void)unused;
	__atomic_add_fetch(&turns, 1, __ATOMIC_RELAXED);
	for (;;)
		pause();
	return NULL;
}

static void enter_tiny_stack(void)
{
	pthread_attr_t how;

	pthread_attr_init(&how);
	if (pthread_attr_setstacksize(&how, sysconf(_SC_THREAD_STACK_MIN)))
		die("pthread_attr_setstacksize");
	for (int i = 0; i < 4; i++)
		start(stay, &how);
	while (turns < 4)
		sched_yield();
	serve();
}

/* The first thread on a stack of its own making, with data right below what it uses. */
static void enter_coroutine(void)
{
	static ucontext_t home, there;

	small_stack = map_anon(2 * SMALL_STACK);
	memset(small_stack, 0x5a, SMALL_STACK);
	getcontext(&there);
	there.uc_stack.ss_sp = small_stack + SMALL_STACK;
	there.uc_stack.ss_size = SMALL_STACK;
	makecontext(&there, (void (*)(void))serve, 0);
	swapcontext(&home, &there);
}

static bool nothing_written_below(void)
{
	for (long i = 0; i < SMALL_STACK; i++)
		if (small_stack[i] != 0x5a)
			return false;
	return true;
}

static void *take_a_turn(void *unused)
{
	(void)unused;
	__atomic_add_fetch(&turns, 1, __ATOMIC_RELAXED);
	return NULL;
}

static void *come_and_go(void *unused)
{
	pthread_t some[4];

	(void)unused;
	for (;;) {
		for (int i = 0; i < 4; i++)
			some[i] = start(take_a_turn, NULL);
		for (int i = 0; i < 4; i++)
			pthread_join(some[i], NULL);
	}
	return NULL;
}

static void enter_short_threads(void)
{
	start(come_and_go, NULL);
	serve();
}

/* Whether it goes on. */
static bool takes_turns(void)
{
	long before = turns;

	for (int tries = 0; tries < 10000 && turns < before + 100; tries++)
		nap_ms(1);
	return turns > before;
}

/* --- 32-bit code in a 64-bit program, as in those that run other systems' programs --- */

static volatile uint32_t *turns32;

static void *run_code32(void *unused)
{
	/* again: incl turns32; jmp again */
	unsigned char code[] = { 0xff, 0x05, 0, 0, 0, 0, 0xeb, 0xf8 };
	unsigned char *low = mmap(NULL, 8192, PROT_READ | PROT_WRITE | PROT_EXEC,
				  MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
	uint32_t counter = (uintptr_t)low + 4096;
	sigset_t all;

	(void)unused;
	if (low == MAP_FAILED)
		die("mmap");
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, NULL);
	memcpy(code + 2, &counter, sizeof(counter));
	memcpy(low, code, sizeof(code));
	turns32 = (void *)(low + 4096);
	/* The segments of 32-bit code. */
	__asm__ volatile("mov %0, %%ds\n\tpushq $0x23\n\tpushq %1\n\tlretq"
			 : : "r"(0x2b), "r"(low) : "memory");
	return NULL;
}

static void enter_code32(void)
{
	start(run_code32, NULL);
	while (!turns32)
		nap_ms(1);
	serve();
}

static bool turns_in_code32(void)
{
	uint32_t before = *turns32;

	for (int tries = 0; tries < 10000 && *turns32 == before; tries++)
		nap_ms(1);
	return *turns32 != before;
}

/* The first thread ends at once, or when told to. */
static void enter_without_leader(void)
{
	start(serve_in_thread, NULL);
	pthread_exit(NULL);
}

static int leave[2];

static void enter_leader_leaves(void)
{
	char byte;

	if (pipe(leave))
		die("pipe");
	start(serve_in_thread, NULL);
	while (read(leave[0], &byte, 1) != 1)
		;
	pthread_exit(NULL);
}

static bool let_leader_leave(void)
{
	char state = 0;

	if (write(leave[1], "", 1) != 1)
		return false;
	for (int tries = 0; tries < 10000 && state != 'Z'; tries++, nap_ms(1)) {
		FILE *stat = fopen("/proc/self/stat", "r");

		if (!stat || fscanf(stat, "%*d (%*[^)]) %c", &state) != 1)
			die("/proc/self/stat");
		fclose(stat);
	}
	return state == 'Z';
}

/* --- vfork: the first thread waits for its child, another serves --- */

static int vfork_ends[2];
static volatile pid_t vforking;
static volatile int vforked = -1;

static void enter_vfork(void)
{
	char byte;
	int status;

	if (pipe(leave) || pipe(vfork_ends))
		die("pipe");
	signal(SIGCHLD, SIG_DFL); /* it has a child that ends */
	other = gettid();
	start(serve_in_thread, NULL);
	while (read(leave[0], &byte, 1) != 1)
		;
	pid_t child = vfork();
	if (child == 0) {
		vforking = getpid();
		if (read(vfork_ends[0], &byte, 1) != 1)
			_exit(1);
		execl("/bin/true", "true", NULL);
		_exit(1);
	}
	vforked = waitpid(child, &status, 0) == child ? status : -2;
	stay(NULL);
}

/* The first time it vforks, the second time the child calls exec. */
static bool vfork_or_exec(void)
{
	bool second = vforking;

	if (write(second ? vfork_ends[1] : leave[1], "", 1) != 1)
		return false;
	for (int tries = 0; tries < 10000 && (second ? vforked == -1 : !vforking); tries++)
		nap_ms(1);
	return second ? vforked == 0 : vforking;
}

/* --- the parent of what is watched: "go" tells the number of the child --- */

static void enter_parent(void)
{
	other = fork();
	if (other < 0)
		die("fork");
	if (other == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		stay(NULL);
	}
	serve();
}

static bool child_is_quiet(void)
{
	siginfo_t info = { 0 };

	return !waitid(P_PID, other, &info, WEXITED | WSTOPPED | WCONTINUED | WNOHANG) &&
	       !info.si_pid;
}

/* --- io_uring: threads of the kernel in this process --- */

static struct ring {
	int fd;
	struct io_uring_params params;
	struct io_uring_sqe *entries;
	char *rings;
} ring;

static void ring_open(uint32_t flags)
{
	ring.params.flags = flags;
	ring.params.sq_thread_idle = 100;
	ring.fd = syscall(SYS_io_uring_setup, 8, &ring.params);
	if (ring.fd < 0)
		die("io_uring_setup");
	ring.rings = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, ring.fd,
			  IORING_OFF_SQ_RING);
	ring.entries = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, ring.fd,
			    IORING_OFF_SQES);
	if (ring.rings == MAP_FAILED || ring.entries == MAP_FAILED)
		die("mmap of rings");
}

static uint32_t *ring_word(uint32_t offset)
{
	return (uint32_t *)(ring.rings + offset);
}

/* One entry; a polling thread of the kernel takes it by itself once it is awake. */
static void ring_submit(struct io_uring_sqe entry)
{
	uint32_t tail = *ring_word(ring.params.sq_off.tail);
	uint32_t at = tail & *ring_word(ring.params.sq_off.ring_mask);

	ring.entries[at] = entry;
	ring_word(ring.params.sq_off.array)[at] = at;
	__atomic_store_n(ring_word(ring.params.sq_off.tail), tail + 1, __ATOMIC_RELEASE);
	if (syscall(SYS_io_uring_enter, ring.fd, 1, 0, IORING_ENTER_SQ_WAKEUP, NULL, 0) < 0)
		die("io_uring_enter");
}

static uint32_t ring_done(void)
{
	return __atomic_load_n(ring_word(ring.params.cq_off.tail), __ATOMIC_ACQUIRE);
}

static int ring_result(uint32_t number)
{
	uint32_t at = number & *ring_word(ring.params.cq_off.ring_mask);

	return ((struct io_uring_cqe *)(ring.rings + ring.params.cq_off.cqes))[at].res;
}

static char fifo_path[256];

/* A worker that waits in open(2) of a FIFO, for the other side to be opened. */
static void enter_uring_worker(void)
{
	snprintf(fifo_path, sizeof(fifo_path), "%s.ring", target_argv[1]);
	if (mkfifo(fifo_path, 0600))
		die(fifo_path);
	ring_open(0);
	ring_submit((struct io_uring_sqe){ .opcode = IORING_OP_OPENAT,
					   .flags = IOSQE_ASYNC,
					   .fd = AT_FDCWD,
					   .addr = (uint64_t)fifo_path,
					   .open_flags = O_RDONLY });
	serve();
}

static bool open_goes_on(void)
{
	if (ring_done())
		fprintf(stderr, "open of a FIFO: %s\n", strerror(-ring_result(0)));
	return !ring_done();
}

static bool open_ends_well(void)
{
	static const struct condition done = { "uring_worker, done", NULL, NULL, NULL };
	int fd = open(fifo_path, O_RDWR); /* never waits */

	for (int tries = 0; tries < 10000 && !ring_done(); tries++)
		nap_ms(1);
	condition = &done;
	return fd >= 0 && ring_done() == 1 && ring_result(0) >= 0;
}

static uint64_t ring_buffer;

/* A thread of the kernel that looks for entries, and one read of a pipe that waits. */
static void enter_uring_polled(void)
{
	if (pipe(leave))
		die("pipe");
	ring_open(IORING_SETUP_SQPOLL);
	ring_submit((struct io_uring_sqe){ .opcode = IORING_OP_READ,
					   .fd = leave[0],
					   .addr = (uint64_t)&ring_buffer,
					   .len = sizeof(ring_buffer) });
	serve();
}

static bool read_ends_well(void)
{
	uint64_t word = 0x1234;

	if (ring_done() || write(leave[1], &word, sizeof(word)) != sizeof(word))
		return false;
	for (int tries = 0; tries < 10000 && !ring_done(); tries++)
		nap_ms(1);
	return ring_done() == 1 && ring_result(0) == sizeof(word) && ring_buffer == word;
}

/* --- exec: "go" begins `--times` of them, after which it is ready again --- */

_Noreturn static void exec_again(void)
{
	char left[24];
	char *argv[] = { target_argv[0], target_argv[1], target_argv[2], "--in",
			 (char *)condition->name, "--left", left, NULL };

	snprintf(left, sizeof(left), "%ld", option("--left", option("--times", 1000)) - 1);
	execv("/proc/self/exe", argv);
	for (;;)
		die("execv");
}

static void *exec_from_thread(void *unused)
{
	(void)unused;
	exec_again();
}

static void exec_now(void)
{
	if (!strcmp(condition->name, "exec"))
		exec_again();
	start(stay, NULL);
	start(exec_from_thread, NULL);
	stay(NULL);
}

static void enter_exec(void)
{
	if (option("--left", 0) > 0)
		exec_now();
	serve();
}

static bool begin_execs(void)
{
	say("ok");
	exec_now();
	return true;
}

static const struct condition conditions[] = {
	{ "plain", serve, NULL, NULL },
	{ "seccomp_errno", enter_seccomp_errno, still_forbidden, NULL },
	{ "seccomp_kill", enter_seccomp_kill, NULL, NULL },
	{ "seccomp_trap", enter_seccomp_trap, NULL, NULL },
	{ "mount_namespace", enter_mount_namespace, NULL, NULL },
	{ "user_namespace", enter_user_namespace, NULL, NULL },
	{ "pid_namespace", enter_pid_namespace, NULL, NULL },
	{ "nobody", enter_nobody, NULL, NULL },
	{ "full_table", enter_full_table, still_full, NULL },
	{ "full_table_hard", enter_full_table_hard, still_full, NULL },
	{ "full_table_nobody", enter_full_table_nobody, still_full, NULL },
	{ "handler", enter_handler, NULL, NULL },
	{ "alternate_stack", enter_alternate_stack, on_alternate_stack, NULL },
	{ "pending", enter_pending, all_came, NULL },
	{ "tiny_stack", enter_tiny_stack, NULL, NULL },
	{ "coroutine", enter_coroutine, nothing_written_below, NULL },
	{ "short_threads", enter_short_threads, takes_turns, NULL },
	{ "code32", enter_code32, turns_in_code32, NULL },
	{ "without_leader", enter_without_leader, NULL, NULL },
	{ "leader_leaves", enter_leader_leaves, NULL, let_leader_leave },
	{ "vfork", enter_vfork, NULL, vfork_or_exec },
	{ "parent", enter_parent, child_is_quiet, NULL },
	{ "uring_worker", enter_uring_worker, open_goes_on, open_ends_well },
	{ "uring_polled", enter_uring_polled, NULL, read_ends_well },
	{ "exec", enter_exec, NULL, begin_execs },
	{ "exec_thread", enter_exec, NULL, begin_execs },
};

#define COUNT (sizeof(conditions) / sizeof(conditions[0]))

_Noreturn static void serve(void)
{
	static struct text text;
	char line[256];

	put(&text, "{\"pid\": %d, \"tid\": %d, \"other\": %d}", getpid(), gettid(), other);
	say_ready(&text);
	while (target_command(line, sizeof(line)))
		if (!strcmp(line, "go") && condition->go)
			say("%s", condition->go() ? "ok" : "bad");
		else
			say("%s", !strcmp(line, "check") && check() ? "ok" : "bad");
	_exit(check() ? 0 : 1);
}

int main(int argc, char **argv)
{
	target_begin(argc, argv);
	const char *name = option_text("--in", "plain");
	for (size_t i = 0; i < COUNT; i++)
		if (!strcmp(name, conditions[i].name))
			condition = &conditions[i];
	if (!condition)
		die(name);
	expect_no_signals();
	start_timers();
	condition->enter();
}
