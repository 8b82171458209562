/*
 * Every way of changing memory, one command each.
 *
 * Each way has memory of its own and a shadow of what must be there, kept by ordinary stores. What
 * it changes, and to what, follows from --seed and from how often it was asked before.
 *
 * Options: --seed N (1), --ring 0 for one without io_uring.
 * Commands:
 *   WAY     "ok", "cannot WHY" where the machine lacks what it takes, else "bad WHY"
 *   areas   [{"way", "data", "shadow", "bytes"}], JSON, of those whose contents are promised:
 *           where pages may be reclaimed or are written all the time, nothing is
 *   check
 */
#include "rawio.h"

#include <linux/falloc.h>
#include <linux/futex.h>
#include <linux/userfaultfd.h>
#include <malloc.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>

#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#define MADV_GUARD_REMOVE 103
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MAP_DROPPABLE
#define MAP_DROPPABLE 0x08
#endif
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

#define PAGES 16ul /* of an area; as much as a pipe takes */
#define HUGE_PAGE (2ul << 20)
#define HUGE_PAGES (HUGE_PAGE / PAGE)
#define WRITERS 3
#define CHILDREN 4

struct area {
	char *at, *shadow; /* no shadow: nothing is promised */
	size_t pages;
	int fd, other; /* of its file, and another descriptor if it takes one */
	unsigned turn;
	struct area *second; /* of a way that needs two */
};

/* What a way returns: NULL when it is done, else why not. */
typedef const char *way_fn(struct area *area);

struct way {
	const char *name;
	void (*setup)(struct area *area);
	way_fn *act;
	bool loose, two;
	struct area area, second;
	struct area *acts_on;
};

static uint64_t random_state, last_seed;

/* --- memory and its shadow --- */

static uint64_t draw(uint64_t below)
{
	return mix(random_state++) % below;
}

/* Some pages of an area, at least one. */
static size_t some(const struct area *a, size_t *count)
{
	size_t page = draw(a->pages);

	*count = 1 + draw(a->pages - page);
	return page;
}

/* The pages hold this pattern by now, or zeros. */
static void expect(struct area *a, size_t page, size_t count, uint64_t seed)
{
	for (size_t p = page; a->shadow && p < page + count; p++)
		if (seed)
			pattern_write(a->shadow + p * PAGE, seed, p);
		else
			memset(a->shadow + p * PAGE, 0, PAGE);
}

static void store(struct area *a, size_t page, size_t count)
{
	uint64_t seed = ++last_seed;

	for (size_t p = page; p < page + count; p++)
		pattern_write(a->at + p * PAGE, seed, p);
	expect(a, page, count, seed);
}

static void store_some(struct area *a)
{
	size_t count, page = some(a, &count);

	store(a, page, count);
}

/* A new pattern for these pages, ready to be copied to where they are. */
static char *pattern_for(struct area *a, size_t page, size_t count)
{
	static char words[HUGE_PAGE] __attribute__((aligned(PAGE)));
	uint64_t seed = ++last_seed;

	for (size_t p = 0; p < count; p++)
		pattern_write(words + p * PAGE, seed, page + p);
	expect(a, page, count, seed);
	return words;
}

static const char *refused(const char *what)
{
	static char why[128];

	snprintf(why, sizeof(why), "%s: %s", what, strerror(errno));
	return why;
}

static const char *advise(struct area *a, size_t page, size_t count, int advice)
{
	if (!madvise(a->at + page * PAGE, count * PAGE, advice))
		return NULL;
	return errno == EINVAL ? "cannot: the kernel does not know this advice"
			       : refused("madvise");
}

static uint64_t pagemap_word(const char *at)
{
	uint64_t word = 0;
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

	if (pread(fd, &word, sizeof(word), (uintptr_t)at / PAGE * sizeof(word)) != sizeof(word))
		die("pagemap");
	close(fd);
	return word;
}

static void setup_anon(struct area *a)
{
	a->at = map_anon(a->pages * PAGE);
	store(a, 0, a->pages);
}

/* A place aligned like a huge page, in a reserve of its own. */
static char *huge_place(size_t bytes)
{
	char *at = mmap(NULL, bytes + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (at == MAP_FAILED)
		die("mmap");
	return (char *)(((uintptr_t)at + HUGE_PAGE - 1) & -HUGE_PAGE);
}

static int open_file(const char *suffix, int flags)
{
	char path[4096];

	snprintf(path, sizeof(path), "%s.%s", target_argv[1], suffix);
	int fd = open(path, O_RDWR | O_CLOEXEC | flags, 0600);

	if (fd < 0)
		die(path);
	return fd;
}

static int unlinked(int fd)
{
	char link[64], path[4096] = "";

	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	if (readlink(link, path, sizeof(path) - 1) < 0 || unlink(path))
		die(link);
	return fd;
}

static void fill_file(struct area *a, int fd, size_t page, size_t count)
{
	char *words = pattern_for(a, page, count);

	if (pwrite(fd, words, count * PAGE, page * PAGE) != (ssize_t)(count * PAGE))
		die("pwrite");
}

/* --- stores, and copies that the kernel makes for us --- */

static struct {
	struct area *area;
	size_t page, count;
} shares[WRITERS];

static void *store_share(void *share)
{
	int i = (int)(intptr_t)share;

	for (size_t p = shares[i].page; p < shares[i].page + shares[i].count; p++)
		pattern_write(shares[i].area->at + p * PAGE, last_seed, p);
	return NULL;
}

static const char *way_threads(struct area *a)
{
	pthread_t threads[WRITERS];

	last_seed++;
	for (size_t i = 0; i < WRITERS; i++) {
		size_t page = i * PAGES / WRITERS, count = 1 + draw(PAGES / WRITERS);

		shares[i].area = a;
		shares[i].page = page;
		shares[i].count = count;
		expect(a, page, count, last_seed);
		errno = pthread_create(&threads[i], NULL, store_share, (void *)i);
		if (errno)
			die("pthread_create");
	}
	for (int i = 0; i < WRITERS; i++)
		pthread_join(threads[i], NULL);
	return NULL;
}

static const char *way_same_value(struct area *a)
{
	volatile uint64_t *words = (uint64_t *)a->at;

	for (size_t i = 0; i < a->pages * PAGE_WORDS; i++)
		words[i] = words[i];
	return NULL;
}

static void setup_pipe(struct area *a)
{
	int ends[2];

	setup_anon(a);
	if (pipe2(ends, O_CLOEXEC))
		die("pipe");
	a->fd = ends[0];
	a->other = ends[1];
}

static void setup_pair(struct area *a)
{
	int ends[2];

	setup_anon(a);
	if (socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, ends))
		die("socketpair");
	a->fd = ends[0];
	a->other = ends[1];
}

static const char *way_read(struct area *a)
{
	size_t count, page = some(a, &count);
	ssize_t bytes = count * PAGE;

	if (write(a->other, pattern_for(a, page, count), bytes) != bytes ||
	    read(a->fd, a->at + page * PAGE, bytes) != bytes)
		return refused("read");
	return NULL;
}

static const char *way_recv(struct area *a)
{
	size_t count, page = some(a, &count);
	ssize_t bytes = count * PAGE;

	if (send(a->other, pattern_for(a, page, count), bytes, 0) != bytes ||
	    recv(a->fd, a->at + page * PAGE, bytes, 0) != bytes)
		return refused("recv");
	return NULL;
}

/* Descriptors to read from: through the page cache, and past it where the file system can. */
static void setup_source(struct area *a)
{
	static int number;
	char name[32], path[4200];

	setup_anon(a);
	snprintf(name, sizeof(name), "source%d", number++);
	snprintf(path, sizeof(path), "%s.%s", target_argv[1], name);
	a->fd = open_file(name, O_CREAT | O_TRUNC);
	fill_file(a, a->fd, 0, a->pages);
	store(a, 0, a->pages);
	if (option("--direct", 1))
		a->other = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
}

static const char *way_direct(struct area *a)
{
	size_t count, page = some(a, &count);
	ssize_t bytes = count * PAGE;

	if (a->other < 0)
		return "cannot: the file system has no O_DIRECT";
	fill_file(a, a->fd, page, count);
	if (pread(a->other, a->at + page * PAGE, bytes, page * PAGE) != bytes)
		return refused("pread");
	return NULL;
}

static struct ring ring = { .fd = -1 };

static const char *ring_read(struct area *a, int fd, struct io_uring_sqe request)
{
	size_t count, page = some(a, &count);

	if (ring.fd < 0)
		return "cannot: no io_uring";
	if (fd < 0)
		return "cannot: the file system has no O_DIRECT";
	fill_file(a, a->fd, page, count);
	request.fd = fd;
	request.addr = (uintptr_t)a->at + page * PAGE;
	request.len = count * PAGE;
	request.off = page * PAGE;
	int result = ring_do(&ring, request);

	errno = result < 0 ? -result : 0;
	return result == (int)(count * PAGE) ? NULL : refused("io_uring");
}

static const char *way_uring(struct area *a)
{
	return ring_read(a, a->fd, (struct io_uring_sqe){ .opcode = IORING_OP_READ });
}

static const char *way_uring_worker(struct area *a)
{
	return ring_read(a, a->fd, (struct io_uring_sqe){ .opcode = IORING_OP_READ,
							  .flags = IOSQE_ASYNC });
}

static const char *way_uring_direct(struct area *a)
{
	return ring_read(a, a->other, (struct io_uring_sqe){ .opcode = IORING_OP_READ });
}

/* The ring can be given its buffers only once, so all fixed areas are in this table. */
static struct iovec fixed_buffers[2];
static int fixed_count;

static void setup_fixed(struct area *a)
{
	setup_source(a);
	fixed_buffers[fixed_count++] = (struct iovec){ a->at, a->pages * PAGE };
}

static void register_fixed(void)
{
	if (ring.fd >= 0 && syscall(SYS_io_uring_register, ring.fd, IORING_REGISTER_BUFFERS,
				    fixed_buffers, fixed_count))
		die("IORING_REGISTER_BUFFERS");
}

static struct io_uring_sqe fixed_request(const struct area *a)
{
	return (struct io_uring_sqe){ .opcode = IORING_OP_READ_FIXED,
				      .buf_index = fixed_buffers[0].iov_base != a->at };
}

static const char *way_uring_fixed(struct area *a)
{
	return ring_read(a, a->fd, fixed_request(a));
}

static const char *way_uring_fixed_direct(struct area *a)
{
	return ring_read(a, a->other, fixed_request(a));
}

static aio_context_t aio_context;

static const char *aio_some(struct area *a, int fd)
{
	size_t count, page = some(a, &count);

	if (!aio_context)
		return "cannot: no AIO";
	if (fd < 0)
		return "cannot: the file system has no O_DIRECT";
	fill_file(a, a->fd, page, count);
	return aio_read(aio_context, fd, a->at + page * PAGE, count * PAGE, page * PAGE)
		       ? NULL
		       : refused("io_submit");
}

static const char *way_aio(struct area *a)
{
	return aio_some(a, a->fd);
}

static const char *way_aio_direct(struct area *a)
{
	return aio_some(a, a->other);
}

/*
 * A thread that has reads under way all the time, of two contents by turns. The device writes
 * while the thread is stopped, and the page table does not show it. Ends the next time.
 */
static pthread_t direct_thread;
static bool direct_going;

static void *read_without_pause(void *arg)
{
	const struct area *a = arg;
	size_t bytes = a->pages * PAGE;
	aio_context_t context = 0;

	if (syscall(SYS_io_setup, 4, &context))
		die("io_setup");
	for (unsigned turn = 0; __atomic_load_n(&direct_going, __ATOMIC_ACQUIRE); turn++)
		if (!aio_read(context, a->other, a->at, bytes, turn % 2 * bytes))
			die("io_submit");
	syscall(SYS_io_destroy, context);
	return NULL;
}

static const char *way_aio_direct_at_full_speed(struct area *a)
{
	if (a->other < 0 || !aio_context)
		return "cannot: no AIO past the page cache";
	direct_going = !direct_going;
	if (!direct_going) {
		errno = pthread_join(direct_thread, NULL);
		return errno ? refused("pthread_join") : NULL;
	}
	size_t bytes = a->pages * PAGE;

	if (pwrite(a->fd, pattern_for(a, 0, a->pages), bytes, bytes) != (ssize_t)bytes)
		return refused("pwrite");
	errno = pthread_create(&direct_thread, NULL, read_without_pause, a);
	return errno ? refused("pthread_create") : NULL;
}

/* The kernel stores a signal's frame on the alternate stack. */
static void on_usr1(int signal)
{
	(void)signal;
}

static const char *way_signal_frame(struct area *a)
{
	stack_t stack = { .ss_sp = a->at, .ss_size = a->pages * PAGE }, before;
	struct sigaction act = { .sa_handler = on_usr1, .sa_flags = SA_ONSTACK };

	sigaction(SIGUSR1, &act, NULL);
	if (sigaltstack(&stack, &before) || raise(SIGUSR1) || sigaltstack(&before, NULL))
		return refused("sigaltstack");
	return NULL;
}

/* --- another process that writes here --- */

enum how { VM_WRITEV, POKE, PROC_MEM, STORE_COMMON, STORE_DELETED };

struct order {
	enum how how;
	char *at;
	size_t page, count;
	uint64_t seed;
};

static int orders[2], answers[2];
static char *common;	/* shared memory, older than the helper */
static int deleted_fd;	/* a file that the helper maps too */
static char *of_helper; /* where */

static bool poke(pid_t pid, char *to, const char *words, size_t bytes)
{
	bool good = true;
	int status;

	if (ptrace(PTRACE_SEIZE, pid, 0, 0))
		return false;
	if (ptrace(PTRACE_INTERRUPT, pid, 0, 0) || waitpid(pid, &status, __WALL) != pid)
		return false;
	for (size_t i = 0; good && i < bytes; i += sizeof(long))
		good = !ptrace(PTRACE_POKEDATA, pid, to + i, *(long *)(words + i));
	return !ptrace(PTRACE_DETACH, pid, 0, 0) && good;
}

static bool help(const struct order *order)
{
	static char words[PAGES * PAGE];
	size_t bytes = order->count * PAGE;
	char *to = order->at + order->page * PAGE;
	struct iovec from = { words, bytes }, into = { to, bytes };
	char path[32];

	for (size_t p = 0; p < order->count; p++)
		pattern_write(words + p * PAGE, order->seed, order->page + p);
	switch (order->how) {
	case VM_WRITEV:
		return process_vm_writev(getppid(), &from, 1, &into, 1, 0) == (ssize_t)bytes;
	case POKE:
		return poke(getppid(), to, words, bytes);
	case PROC_MEM:
		snprintf(path, sizeof(path), "/proc/%d/mem", getppid());
		int fd = open(path, O_RDWR | O_CLOEXEC);
		bool good = pwrite(fd, words, bytes, (off_t)to) == (ssize_t)bytes;
		close(fd);
		return good;
	case STORE_COMMON:
		memcpy(to, words, bytes);
		return true;
	case STORE_DELETED:
		memcpy(of_helper + order->page * PAGE, words, bytes);
		return true;
	}
	return false;
}

static void start_helper(void)
{
	struct order order;

	if (pipe2(orders, O_CLOEXEC) || pipe2(answers, O_CLOEXEC))
		die("pipe");
	common = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
		      0);
	deleted_fd = unlinked(open_file("deleted-shared", O_CREAT | O_TRUNC));
	if (common == MAP_FAILED || ftruncate(deleted_fd, PAGES * PAGE))
		die("common");
	pid_t pid = fork();

	if (pid < 0)
		die("fork");
	if (pid)
		return;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	of_helper = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, deleted_fd, 0);
	close(orders[1]);
	while (read(orders[0], &order, sizeof(order)) == sizeof(order)) {
		char answer = help(&order);

		if (write(answers[1], &answer, 1) != 1)
			break;
	}
	_exit(0);
}

static const char *ask_helper(struct area *a, enum how how)
{
	struct order order = { .how = how, .at = a->at, .seed = ++last_seed };
	char good;

	order.page = some(a, &order.count);
	if (write(orders[1], &order, sizeof(order)) != sizeof(order) ||
	    read(answers[0], &good, 1) != 1)
		return refused("helper");
	expect(a, order.page, order.count, order.seed);
	return good ? NULL : "the helper failed";
}

static const char *way_vm_writev(struct area *a)
{
	return ask_helper(a, VM_WRITEV);
}

static const char *way_poke(struct area *a)
{
	return ask_helper(a, POKE);
}

static const char *way_proc_mem(struct area *a)
{
	return ask_helper(a, PROC_MEM);
}

static void setup_common(struct area *a)
{
	a->at = common;
	store(a, 0, a->pages);
}

static const char *way_shared_by_another(struct area *a)
{
	return ask_helper(a, STORE_COMMON);
}

/* Mapped privately here: pages that are not yet our own show what another process stores. */
static void setup_deleted(struct area *a)
{
	fill_file(a, deleted_fd, 0, a->pages);
	a->at = mmap(NULL, a->pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, deleted_fd, 0);
	if (a->at == MAP_FAILED)
		die("mmap");
}

static const char *way_deleted_by_another(struct area *a)
{
	return ask_helper(a, STORE_DELETED);
}

/* A page that is only readable gets a copy of its own. */
static void setup_read_only(struct area *a)
{
	setup_anon(a);
	mprotect(a->at, a->pages * PAGE, PROT_READ);
}

static const char *way_forced(struct area *a)
{
	size_t count, page = some(a, &count);
	int fd = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
	ssize_t bytes = count * PAGE;
	ssize_t wrote =
		pwrite(fd, pattern_for(a, page, count), bytes, (off_t)(a->at + page * PAGE));

	close(fd);
	return wrote == bytes ? NULL : refused("/proc/self/mem");
}

static const char *way_own_vm_writev(struct area *a)
{
	size_t count, page = some(a, &count);
	ssize_t bytes = count * PAGE;
	struct iovec from = { pattern_for(a, page, count), bytes };
	struct iovec into = { a->at + page * PAGE, bytes };

	if (process_vm_writev(getpid(), &from, 1, &into, 1, 0) != bytes)
		return refused("process_vm_writev");
	return NULL;
}

/* --- children in the same address space --- */

struct child {
	struct area *area;
	size_t page, count;
	uint64_t seed;
	uint32_t ordered, done; /* futexes: how many orders, how many of them are done */
	bool staying, busy;
	pid_t pid;
	char stack[8 * PAGE] __attribute__((aligned(16)));
};

static struct child before_watch, ending, busy, staying[CHILDREN];

static void futex_wait(uint32_t *word, uint32_t while_it_is)
{
	syscall(SYS_futex, word, FUTEX_WAIT, while_it_is, NULL, NULL, 0);
}

static void futex_set(uint32_t *word, uint32_t to)
{
	__atomic_store_n(word, to, __ATOMIC_RELEASE);
	syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
}

static int run_child(void *arg)
{
	struct child *me = arg;
	uint32_t done = me->done;

	syscall(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
	do {
		while (__atomic_load_n(&me->ordered, __ATOMIC_ACQUIRE) == done)
			futex_wait(&me->ordered, done);
		do {
			for (size_t p = me->page; p < me->page + me->count; p++)
				pattern_write(me->area->at + p * PAGE, me->seed, p);
			me->seed += me->busy;
		} while (__atomic_load_n(&me->busy, __ATOMIC_ACQUIRE));
		futex_set(&me->done, ++done);
	} while (me->staying);
	syscall(SYS_exit, 0);
	return 0;
}

static const char *start_child(struct child *child, bool stays)
{
	child->staying = stays;
	child->pid = clone(run_child, child->stack + sizeof(child->stack), CLONE_VM | SIGCHLD,
			   child);
	return child->pid < 0 ? refused("clone") : NULL;
}

static void end_child(struct child *child)
{
	if (!child->pid)
		return;
	kill(child->pid, SIGKILL);
	while (waitpid(child->pid, NULL, 0) < 0 && errno == EINTR)
		;
	*child = (struct child){ 0 };
}

/* Order a child to store, and wait until it has. */
static void let_store(struct child *child, struct area *a)
{
	uint32_t order = child->ordered + 1;

	child->area = a;
	child->page = some(a, &child->count);
	child->seed = ++last_seed;
	expect(a, child->page, child->count, child->seed);
	futex_set(&child->ordered, order);
	for (uint32_t done; (done = __atomic_load_n(&child->done, __ATOMIC_ACQUIRE)) != order;)
		futex_wait(&child->done, done);
}

static const char *way_sharing_child_from_before(struct area *a)
{
	const char *why = before_watch.pid ? NULL : start_child(&before_watch, true);

	if (!why)
		let_store(&before_watch, a);
	return why;
}

static void setup_child_from_before(struct area *a)
{
	setup_anon(a);
	if (way_sharing_child_from_before(a))
		die("clone");
}

static const char *way_sharing_child_that_ends(struct area *a)
{
	const char *why = start_child(&ending, false);

	if (why)
		return why;
	let_store(&ending, a);
	while (waitpid(ending.pid, NULL, 0) < 0 && errno == EINTR)
		;
	ending = (struct child){ 0 };
	return NULL;
}

/* One more each time, up to so many; then the oldest is killed. */
static const char *way_sharing_child_that_stays(struct area *a)
{
	struct child *child = &staying[a->turn % CHILDREN];
	const char *why;

	end_child(child);
	why = start_child(child, true);
	if (!why)
		let_store(child, a);
	return why;
}

/* Begins to write without pause, and ends the next time. */
static const char *way_sharing_child_at_full_speed(struct area *a)
{
	if (busy.pid) {
		end_child(&busy);
		return NULL;
	}
	const char *why = start_child(&busy, true);

	if (why)
		return why;
	busy.area = a;
	busy.count = a->pages;
	busy.busy = true;
	futex_set(&busy.ordered, 1);
	return NULL;
}

__attribute__((noinline)) static void store_seed(struct area *a, size_t page, size_t count,
						 uint64_t seed)
{
	for (size_t p = page; p < page + count; p++)
		pattern_write(a->at + p * PAGE, seed, p);
}

static const char *way_vfork(struct area *a)
{
	size_t count, page = some(a, &count);
	uint64_t seed = ++last_seed;

	expect(a, page, count, seed);
	pid_t pid = vfork();

	if (pid == 0) {
		store_seed(a, page, count, seed);
		_exit(0);
	}
	if (pid < 0)
		return refused("vfork");
	while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
		;
	return NULL;
}

/* Stores while a child shares the pages copy-on-write, and others after it has ended. */
static const char *way_fork(struct area *a)
{
	int ends[2];
	char byte;

	if (pipe2(ends, O_CLOEXEC))
		return refused("pipe");
	pid_t pid = fork();

	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		close(ends[1]);
		memset(a->at, 1, a->pages * PAGE); /* not ours any more */
		_exit(read(ends[0], &byte, 1) != 0);
	}
	store_some(a);
	close(ends[0]);
	close(ends[1]);
	while (pid > 0 && waitpid(pid, NULL, 0) < 0 && errno == EINTR)
		;
	store_some(a);
	return pid < 0 ? refused("fork") : NULL;
}

/* --- contents that go away --- */

static const char *drop(struct area *a, bool and_write)
{
	size_t count, page = some(a, &count);
	const char *why = advise(a, page, count, MADV_DONTNEED);

	if (why)
		return why;
	expect(a, page, count, 0);
	if (and_write)
		store(a, page, 1 + draw(count));
	return NULL;
}

static const char *way_dontneed(struct area *a)
{
	return drop(a, false);
}

static const char *way_dontneed_and_write(struct area *a)
{
	return drop(a, true);
}

/* Every other time anew, since what was freed may be gone. */
static const char *way_free(struct area *a)
{
	size_t count, page = some(a, &count);

	store_some(a);
	return advise(a, page, count, MADV_FREE);
}

static const char *way_free_and_write(struct area *a)
{
	const char *why = advise(a, 0, a->pages, MADV_FREE);

	store(a, 0, a->pages);
	return why;
}

/* Reclaimed on the spot; a page that is still there then is made sure of by a write. */
static const char *way_free_and_reclaim(struct area *a)
{
	size_t count, page = some(a, &count);
	const char *why = advise(a, page, count, MADV_FREE);

	if (!why)
		why = advise(a, page, count, MADV_PAGEOUT);
	for (size_t p = page; !why && p < page + count; p++)
		if (*(volatile uint64_t *)(a->at + p * PAGE + 8) != 0)
			store(a, p, 1);
		else
			expect(a, p, 1, 0);
	return why;
}

static void setup_shared(struct area *a)
{
	a->at = mmap(NULL, a->pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
		     0);
	if (a->at == MAP_FAILED)
		die("mmap");
	store(a, 0, a->pages);
}

static const char *way_remove(struct area *a)
{
	size_t count, page = some(a, &count);
	const char *why = advise(a, page, count, MADV_REMOVE);

	if (!why)
		expect(a, page, count, 0);
	if (!why && a->turn % 2)
		store(a, page, 1);
	return why;
}

static void setup_memfd(struct area *a)
{
	a->fd = memfd_create("ways", MFD_CLOEXEC);
	if (a->fd < 0 || ftruncate(a->fd, a->pages * PAGE))
		die("memfd");
	a->at = mmap(NULL, a->pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, a->fd, 0);
	if (a->at == MAP_FAILED)
		die("mmap");
	store(a, 0, a->pages);
}

static const char *way_punch(struct area *a)
{
	size_t count, page = some(a, &count);

	if (fallocate(a->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, page * PAGE, count * PAGE))
		return refused("fallocate");
	expect(a, page, count, 0);
	fill_file(a, a->fd, page + draw(count), 1);
	return NULL;
}

static const char *way_cold(struct area *a)
{
	store_some(a);
	const char *why = advise(a, 0, a->pages, MADV_COLD);

	store_some(a);
	return why;
}

static const char *swap_out(struct area *a, size_t page, size_t count)
{
	store(a, page + draw(count), 1);
	for (int tries = 0; tries < 20; tries++, nap_ms(1)) {
		const char *why = advise(a, page, count, MADV_PAGEOUT);

		for (size_t p = page; !why && p < page + count; p++)
			if (pagemap_word(a->at + p * PAGE) >> 62 & 1)
				return NULL;
		if (why)
			return why;
	}
	return "cannot: nothing is swapped out";
}

static const char *way_pageout(struct area *a)
{
	if (a->turn % 2)
		store_some(a);
	return swap_out(a, 0, a->pages);
}

static const char *way_pageout_and_write(struct area *a)
{
	const char *why = swap_out(a, 0, a->pages);

	store_some(a);
	return why;
}

static const char *way_pageout_and_drop(struct area *a)
{
	const char *why = swap_out(a, 0, a->pages);

	return why ? why : drop(a, a->turn % 2);
}

static const char *way_populate(struct area *a)
{
	const char *why = drop(a, false);

	if (!why)
		why = advise(a, 0, a->pages, a->turn % 2 ? MADV_POPULATE_READ : MADV_POPULATE_WRITE);
	store_some(a);
	return why;
}

/* --- the address space --- */

static const char *replace(struct area *a, size_t page, size_t count, int flags)
{
	char *at = mmap(a->at + page * PAGE, count * PAGE, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);

	if (at != a->at + page * PAGE)
		return refused("mmap");
	expect(a, page, count, 0);
	if (a->turn % 2)
		store(a, page, 1 + draw(count));
	return NULL;
}

static const char *way_unmap_and_map(struct area *a)
{
	size_t count, page = some(a, &count);

	if (munmap(a->at + page * PAGE, count * PAGE))
		return refused("munmap");
	return replace(a, page, count, MAP_FIXED_NOREPLACE);
}

static const char *way_map_over(struct area *a)
{
	size_t count, page = some(a, &count);

	return replace(a, page, count, MAP_FIXED);
}

/* A file's pages and anonymous ones take turns. */
static const char *way_map_file_over(struct area *a)
{
	size_t count, page = some(a, &count);

	if (a->turn % 2)
		return replace(a, page, count, MAP_FIXED);
	fill_file(a, a->fd, page, count);
	if (mmap(a->at + page * PAGE, count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED,
		 a->fd, page * PAGE) == MAP_FAILED)
		return refused("mmap");
	store(a, page + draw(count), 1);
	return NULL;
}

/* malloc keeps off the heap, see main(), so it is ours to grow and shrink. */
static void setup_brk(struct area *a)
{
	char *end = sbrk(0);

	if (sbrk(-(uintptr_t)end % PAGE) == (void *)-1 ||
	    (a->at = sbrk(a->pages * PAGE)) == (void *)-1)
		die("sbrk");
	store(a, 0, a->pages);
}

static const char *way_brk(struct area *a)
{
	size_t keep = draw(PAGES), before = a->pages;
	long by = a->turn % 2 ? (long)(PAGES - before) : -(long)(before - keep);

	if (sbrk(0) != a->at + before * PAGE)
		return "somebody else has moved the break";
	if (sbrk(by * (long)PAGE) == (void *)-1)
		return refused("sbrk");
	a->pages = (long)before + by;
	if (by > 0)
		expect(a, before, by, 0);
	if (a->pages)
		store_some(a);
	return NULL;
}

__attribute__((noinline)) static unsigned use_stack(unsigned depth)
{
	volatile unsigned frame[PAGE / sizeof(unsigned)];

	frame[0] = depth + (unsigned)draw(1000);
	if (depth)
		frame[1] = use_stack(depth - 1);
	return frame[0] + frame[1];
}

static const char *way_stack(struct area *a)
{
	return use_stack(40 * (a->turn % 16 + 1)) == 1 ? "impossible" : NULL;
}

static const char *way_move(struct area *a)
{
	size_t bytes = a->pages * PAGE;
	char *place = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (a->turn % 2)
		store_some(a);
	char *at = mremap(a->at, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, place);

	if (at == MAP_FAILED)
		return refused("mremap");
	a->at = at;
	if (a->turn % 3)
		store_some(a);
	return NULL;
}

static const char *way_resize(struct area *a)
{
	size_t pages = 1 + draw(PAGES), before = a->pages;
	char *at = mremap(a->at, before * PAGE, pages * PAGE, MREMAP_MAYMOVE);

	if (at == MAP_FAILED)
		return refused("mremap");
	a->at = at;
	a->pages = pages;
	if (pages > before)
		expect(a, before, pages - before, 0);
	if (a->turn % 2)
		store_some(a);
	return NULL;
}

/* The first block's pages move over the second's; the first stays, empty. */
static const char *move_pages_over(struct area *a, struct area *b)
{
	size_t bytes = a->pages * PAGE;

	if (mremap(a->at, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, b->at) ==
	    MAP_FAILED)
		return refused("mremap");
	memcpy(b->shadow, a->shadow, bytes);
	expect(a, 0, a->pages, 0);
	store_some(a);
	return NULL;
}

static const char *way_move_leaving(struct area *a)
{
	return a->turn % 2 ? move_pages_over(a->second, a) : move_pages_over(a, a->second);
}

/* Two blocks change places by way of a third; nothing is written. */
static const char *exchange(struct area *a, struct area *b, char *third)
{
	size_t bytes = a->pages * PAGE;
	int how = MREMAP_MAYMOVE | MREMAP_FIXED;

	if (mremap(a->at, bytes, bytes, how, third) == MAP_FAILED ||
	    mremap(b->at, bytes, bytes, how, a->at) == MAP_FAILED ||
	    mremap(third, bytes, bytes, how, b->at) == MAP_FAILED)
		return refused("mremap");
	char *at = a->at;

	a->at = b->at;
	b->at = at;
	return NULL;
}

static const char *way_exchange(struct area *a)
{
	char *third = mmap(NULL, a->pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	return exchange(a, a->second, third);
}

/* Halves of one block change places, so that its mapping is cut and joined again. */
static const char *way_exchange_within(struct area *a)
{
	size_t half = a->pages / 2;
	struct area low = *a, high = *a;
	char *third = mmap(NULL, half * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	low.pages = high.pages = half;
	high.at += half * PAGE;
	const char *why = exchange(&low, &high, third);

	for (size_t i = 0; !why && i < half * PAGE; i++) {
		char byte = a->shadow[i];

		a->shadow[i] = a->shadow[half * PAGE + i];
		a->shadow[half * PAGE + i] = byte;
	}
	return why;
}

static const char *protect(struct area *a, size_t page, size_t count, int prot)
{
	return mprotect(a->at + page * PAGE, count * PAGE, prot) ? refused("mprotect") : NULL;
}

/* Every other time it stays unreadable, with what it holds. */
static const char *way_protect_none(struct area *a)
{
	size_t count, page = some(a, &count);
	const char *why = protect(a, 0, a->pages, PROT_READ | PROT_WRITE);

	if (!why && a->turn % 2)
		store_some(a);
	if (!why)
		why = protect(a, page, count, PROT_NONE);
	return why || a->turn % 2 == 0 ? why : protect(a, page, count, PROT_READ | PROT_WRITE);
}

static const char *way_protect_read(struct area *a)
{
	size_t count, page = some(a, &count);
	const char *why = protect(a, page, count, PROT_READ);

	if (!why)
		why = protect(a, 0, a->pages, PROT_READ | PROT_WRITE);
	if (!why)
		store_some(a);
	return why ? why : protect(a, page, count, PROT_READ);
}

/* A mapping that may only be read, one that may be written, and room behind. */
static void setup_regrown(struct area *a)
{
	char *far_away = (char *)(1UL << 45); /* the kernel itself puts nothing there */

	a->at = mmap(far_away, a->pages * PAGE, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	if (a->at == MAP_FAILED)
		die("mmap");
	store(a, 0, a->pages);
	protect(a, 0, 4, PROT_READ);
}

/* The second is joined with a new one, and then with the first. In the end all is as it was. */
static const char *way_regrown(struct area *a)
{
	size_t rest = a->pages - 4;
	char *end = a->at + a->pages * PAGE;

	if (mmap(end, PAGE, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) != end)
		return "cannot: somebody took the room";
	munmap(end, PAGE);
	const char *why = protect(a, 4, rest, PROT_NONE);

	if (!why)
		why = protect(a, 4, rest, PROT_READ | PROT_WRITE);
	if (!why)
		store(a, 4 + draw(rest), 1);
	if (!why)
		why = protect(a, 0, 4, PROT_READ | PROT_WRITE);
	return why ? why : protect(a, 0, 4, PROT_READ);
}

/* Mappings cut and joined without a change of contents: names and locks. */
static const char *way_cut(struct area *a)
{
	size_t count, page = some(a, &count);
	char *at = a->at + page * PAGE;

	if (a->turn % 2 ? mlock(at, count * PAGE) : munlock(a->at, a->pages * PAGE))
		return refused("mlock");
	prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, at, count * PAGE, a->turn % 3 ? "cut" : NULL);
	store_some(a);
	return NULL;
}

static const char *way_clear_refs(struct area *a)
{
	int fd = open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC);
	const char *which = a->turn % 2 ? "1" : "4";
	bool good = write(fd, which, 1) == 1;

	close(fd);
	store_some(a);
	return good ? NULL : "cannot: no clear_refs";
}

/* --- huge pages --- */

static void setup_thp(struct area *a)
{
	a->at = mmap(huge_place(HUGE_PAGE), HUGE_PAGE, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	if (a->at == MAP_FAILED || madvise(a->at, HUGE_PAGE, MADV_HUGEPAGE))
		die("huge pages");
	store(a, 0, a->pages);
}

/* Small pages that fill a page table, which can be moved as a whole. */
static void setup_table(struct area *a)
{
	setup_thp(a);
	if (madvise(a->at, HUGE_PAGE, MADV_NOHUGEPAGE) || madvise(a->at, HUGE_PAGE, MADV_DONTNEED))
		die("small pages");
	store(a, 0, a->pages);
}

static const char *way_thp(struct area *a)
{
	store(a, draw(a->pages), 1);
	if (a->turn % 4 == 3) {
		advise(a, 0, a->pages, MADV_DONTNEED);
		expect(a, 0, a->pages, 0);
		store(a, draw(a->pages), 1); /* a whole huge page, with one page of data */
	}
	return NULL;
}

static const char *way_thp_drop(struct area *a)
{
	return drop(a, a->turn % 2);
}

static const char *way_thp_protect(struct area *a)
{
	size_t count, page = some(a, &count);
	const char *why = protect(a, page, count, PROT_READ);

	if (!why)
		why = protect(a, page, count, PROT_READ | PROT_WRITE);
	store(a, page, 1);
	return why;
}

/* Small pages become a huge one. Armed ones must not, so all are written before. */
static const char *way_collapse(struct area *a)
{
	const char *why = advise(a, 0, a->pages, MADV_DONTNEED);

	if (!why)
		why = advise(a, 0, a->pages, MADV_NOHUGEPAGE);
	store(a, 0, a->pages);
	if (!why)
		why = advise(a, 0, a->pages, MADV_HUGEPAGE);
	if (!why && madvise(a->at, HUGE_PAGE, MADV_COLLAPSE) && a->turn % 2)
		why = errno == EAGAIN || errno == EINVAL ? NULL : refused("MADV_COLLAPSE");
	store(a, draw(a->pages), 1);
	return why;
}

/* Whether what is armed collapses is the kernel's matter. */
static const char *way_collapse_as_is(struct area *a)
{
	madvise(a->at, HUGE_PAGE, MADV_COLLAPSE);
	if (a->turn % 2)
		store(a, draw(a->pages), 1);
	if (a->turn % 3 == 2)
		return drop(a, false);
	return NULL;
}

static const char *way_thp_move(struct area *a)
{
	char *at = mremap(a->at, HUGE_PAGE, HUGE_PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
			  huge_place(HUGE_PAGE));

	if (at == MAP_FAILED)
		return refused("mremap");
	a->at = at;
	return NULL;
}

static const char *way_thp_exchange(struct area *a)
{
	return exchange(a, a->second, huge_place(HUGE_PAGE));
}

/* A place at the end of what a page table is for, with nothing else there. */
static char *end_of_table(size_t bytes)
{
	char *at = huge_place(HUGE_PAGE);

	if (munmap(at, HUGE_PAGE - bytes))
		die("munmap");
	return at + HUGE_PAGE - bytes;
}

static void setup_end_of_table(struct area *a)
{
	size_t bytes = a->pages * PAGE;

	a->at = mmap(end_of_table(bytes), bytes, PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	if (a->at == MAP_FAILED)
		die("mmap");
	store(a, 0, a->pages);
}

/* Newer kernels move the whole table then, too. */
static const char *way_end_of_table(struct area *a)
{
	return exchange(a, a->second, end_of_table(a->pages * PAGE));
}

static const char *way_thp_zero(struct area *a)
{
	const char *why = advise(a, 0, a->pages, MADV_DONTNEED);

	expect(a, 0, a->pages, 0);
	(void)*(volatile char *)a->at; /* the huge zero page */
	if (a->turn % 2)
		store(a, draw(a->pages), 1);
	return why;
}

static const char *way_thp_pageout(struct area *a)
{
	const char *why = swap_out(a, 0, a->pages);

	if (a->turn % 2)
		store(a, draw(a->pages), 1);
	return why;
}

static void setup_hugetlb(struct area *a, int flags)
{
	a->at = mmap(NULL, HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_ANONYMOUS | MAP_HUGETLB | flags,
		     -1, 0);
	if (a->at == MAP_FAILED) {
		a->at = NULL;
		return;
	}
	store(a, 0, a->pages);
}

static void setup_hugetlb_private(struct area *a)
{
	setup_hugetlb(a, MAP_PRIVATE);
}

static void setup_hugetlb_shared(struct area *a)
{
	setup_hugetlb(a, MAP_SHARED);
}

static const char *way_hugetlb(struct area *a)
{
	if (!a->at)
		return "cannot: no hugetlb page is free";
	store(a, draw(a->pages), 1);
	return NULL;
}

static const char *way_hugetlb_drop(struct area *a)
{
	if (!a->at)
		return "cannot: no hugetlb page is free";
	const char *why = advise(a, 0, a->pages, MADV_DONTNEED);

	if (why)
		return why;
	expect(a, 0, a->pages, 0);
	if (a->turn % 3 == 1)
		store(a, draw(a->pages), 1);
	if (a->turn % 3 == 2)
		(void)*(volatile char *)a->at; /* a new page of zeros */
	return NULL;
}

/* --- equal pages merged --- */

/* Whether two pages are one in memory. */
static bool same_frame(const char *one, const char *other)
{
	uint64_t frame = pagemap_word(one) << 9;

	return frame && frame == pagemap_word(other) << 9;
}

static void setup_mergeable(struct area *a)
{
	setup_anon(a);
	madvise(a->at, a->pages * PAGE, MADV_MERGEABLE);
}

/* Make some pages equal and wait until they are merged. */
static const char *make_equal(struct area *a, bool zeros)
{
	uint64_t seed = ++last_seed;

	for (size_t p = 0; p < 4; p++) {
		if (zeros)
			memset(a->at + p * PAGE, 0, PAGE);
		else
			pattern_write(a->at + p * PAGE, seed, 0);
		memcpy(a->shadow + p * PAGE, a->at + p * PAGE, PAGE);
	}
	for (int tries = 0; tries < 10000; tries++, nap_ms(1))
		if (same_frame(a->at, a->at + PAGE))
			return NULL;
	return "cannot: KSM does not run";
}

/* Merged, and then written in part. */
static const char *way_ksm(struct area *a)
{
	if (a->turn % 2 == 0)
		return make_equal(a, false);
	store(a, draw(4), 1);
	return NULL;
}

static const char *way_ksm_zero(struct area *a)
{
	if (a->turn % 2 == 0)
		return make_equal(a, true);
	store(a, draw(4), 1);
	return NULL;
}

/* --- files mapped privately --- */

static void setup_private_file(struct area *a)
{
	static int number;
	char name[32];

	snprintf(name, sizeof(name), "private%d", number++);
	a->fd = open_file(name, O_CREAT | O_TRUNC);
	fill_file(a, a->fd, 0, a->pages);
	a->at = mmap(NULL, a->pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, a->fd, 0);
	if (a->at == MAP_FAILED)
		die("mmap");
	store(a, 0, a->pages / 2);
}

static void setup_private_deleted(struct area *a)
{
	setup_private_file(a);
	unlinked(a->fd);
}

/* What the file has shows again; what it has now is what the shadow must have. */
static const char *show_file(struct area *a, size_t page, size_t count)
{
	ssize_t bytes = count * PAGE;

	memset(a->shadow + page * PAGE, 0, bytes);
	return pread(a->fd, a->shadow + page * PAGE, bytes, page * PAGE) < 0 ? refused("pread")
									      : NULL;
}

static void setup_mergeable_file(struct area *a)
{
	setup_private_file(a);
	madvise(a->at, a->pages * PAGE, MADV_MERGEABLE);
}

static const char *way_file_write(struct area *a)
{
	store_some(a);
	return NULL;
}

static const char *way_file_drop(struct area *a)
{
	size_t count, page = some(a, &count);
	const char *why = advise(a, page, count, MADV_DONTNEED);

	if (!why)
		why = show_file(a, page, count);
	if (a->turn % 2)
		store(a, page, 1);
	return why;
}

static const char *way_file_pageout(struct area *a)
{
	const char *why = advise(a, 0, a->pages, MADV_PAGEOUT);

	if (a->turn % 2)
		store_some(a);
	return why;
}

/* Changed underneath: pages of our own stay, others follow. */
static const char *way_file_changed(struct area *a)
{
	size_t count, page = some(a, &count);
	const char *why = advise(a, page, count, MADV_DONTNEED);

	if (!why)
		fill_file(a, a->fd, page, count);
	if (a->turn % 2)
		store(a, page, 1);
	return why;
}

/* Truncation takes pages of our own too. */
static const char *way_file_truncated(struct area *a)
{
	size_t keep = draw(PAGES);

	if (ftruncate(a->fd, keep * PAGE))
		return refused("ftruncate");
	expect(a, keep, PAGES - keep, 0);
	a->pages = keep; /* what is beyond can be reached by nobody */
	if (a->turn % 2 == 0)
		return NULL;
	if (ftruncate(a->fd, PAGES * PAGE))
		return refused("ftruncate");
	a->pages = PAGES;
	store_some(a);
	return NULL;
}

/* --- rarer kinds --- */

static const char *way_guard(struct area *a)
{
	size_t count, page = some(a, &count);
	const char *why = advise(a, 0, a->pages, MADV_GUARD_REMOVE);

	if (!why)
		store(a, 0, a->pages);
	if (!why)
		why = advise(a, page, count, MADV_GUARD_INSTALL);
	if (why)
		return why;
	expect(a, page, count, 0);
	if (a->turn % 2 == 0)
		return NULL;
	why = advise(a, page, count, MADV_GUARD_REMOVE);
	if (!why)
		store(a, page, 1);
	return why;
}

static void setup_droppable(struct area *a)
{
	a->at = mmap(NULL, a->pages * PAGE, PROT_READ | PROT_WRITE, MAP_DROPPABLE | MAP_ANONYMOUS,
		     -1, 0);
	if (a->at == MAP_FAILED)
		a->at = NULL;
	else
		store(a, 0, a->pages);
}

static const char *way_droppable(struct area *a)
{
	if (!a->at)
		return "cannot: no MAP_DROPPABLE";
	store_some(a);
	return a->turn % 2 ? advise(a, 0, a->pages, MADV_PAGEOUT) : NULL;
}

static void setup_wipe(struct area *a)
{
	setup_anon(a);
	madvise(a->at, a->pages * PAGE, MADV_WIPEONFORK);
}

static void setup_secret(struct area *a)
{
	int fd = syscall(SYS_memfd_secret, O_CLOEXEC);

	if (fd < 0)
		return;
	if (ftruncate(fd, a->pages * PAGE))
		die("memfd_secret");
	a->at = mmap(NULL, a->pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (a->at == MAP_FAILED)
		a->at = NULL;
	else
		store(a, 0, a->pages);
}

static const char *way_secret(struct area *a)
{
	if (!a->at)
		return "cannot: no memfd_secret";
	store_some(a);
	return NULL;
}

/* Pages that the program's own userfaultfd puts in place. */
static void setup_own_uffd(struct area *a)
{
	struct uffdio_api api = { .api = UFFD_API };

	setup_anon(a);
	if (option("--uffd", 1))
		a->fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	struct uffdio_register range = { .range = { (uintptr_t)a->at, a->pages * PAGE },
					 .mode = UFFDIO_REGISTER_MODE_MISSING };

	if (a->fd >= 0 &&
	    (ioctl(a->fd, UFFDIO_API, &api) || ioctl(a->fd, UFFDIO_REGISTER, &range)))
		die("userfaultfd");
}

static const char *way_own_uffd(struct area *a)
{
	size_t count, page = some(a, &count);

	if (a->fd < 0)
		return "cannot: no userfaultfd";
	const char *why = advise(a, page, count, MADV_DONTNEED);
	struct uffdio_copy copy = { .dst = (uintptr_t)a->at + page * PAGE, .len = count * PAGE };

	copy.src = (uintptr_t)pattern_for(a, page, count);
	if (!why && ioctl(a->fd, UFFDIO_COPY, &copy))
		why = refused("UFFDIO_COPY");
	return why;
}

/* --- the table --- */

#define WAY(name, setup) { #name, setup, way_##name, false, false, { 0 }, { 0 }, NULL }
#define SAME(name) WAY(name, NULL) /* acts on the area of the way before it */
#define LOOSE(name, setup) { #name, setup, way_##name, true, false, { 0 }, { 0 }, NULL }
#define TWO(name, setup) { #name, setup, way_##name, false, true, { 0 }, { 0 }, NULL }

static struct way ways[] = {
	WAY(threads, setup_anon),
	WAY(same_value, setup_anon),
	WAY(read, setup_pipe),
	WAY(recv, setup_pair),
	WAY(direct, setup_source),
	WAY(uring, setup_source),
	WAY(uring_worker, setup_source),
	WAY(uring_direct, setup_source),
	WAY(uring_fixed, setup_fixed),
	WAY(uring_fixed_direct, setup_fixed),
	WAY(aio, setup_source),
	WAY(aio_direct, setup_source),
	LOOSE(aio_direct_at_full_speed, setup_source),
	LOOSE(signal_frame, setup_anon),
	WAY(vm_writev, setup_anon),
	WAY(poke, setup_anon),
	WAY(proc_mem, setup_anon),
	WAY(shared_by_another, setup_common),
	WAY(deleted_by_another, setup_deleted),
	WAY(forced, setup_read_only),
	WAY(own_vm_writev, setup_anon),
	WAY(sharing_child_from_before, setup_child_from_before),
	WAY(sharing_child_that_ends, setup_anon),
	WAY(sharing_child_that_stays, setup_anon),
	LOOSE(sharing_child_at_full_speed, setup_anon),
	WAY(vfork, setup_anon),
	WAY(fork, setup_anon),
	WAY(dontneed, setup_anon),
	WAY(dontneed_and_write, setup_anon),
	LOOSE(free, setup_anon),
	WAY(free_and_write, setup_anon),
	WAY(free_and_reclaim, setup_anon),
	WAY(remove, setup_shared),
	WAY(punch, setup_memfd),
	WAY(cold, setup_anon),
	WAY(pageout, setup_anon),
	WAY(pageout_and_write, setup_anon),
	WAY(pageout_and_drop, setup_anon),
	WAY(populate, setup_anon),
	WAY(unmap_and_map, setup_anon),
	WAY(map_over, setup_anon),
	WAY(map_file_over, setup_source),
	WAY(brk, setup_brk),
	LOOSE(stack, setup_anon),
	WAY(move, setup_anon),
	WAY(resize, setup_anon),
	TWO(move_leaving, setup_anon),
	TWO(exchange, setup_anon),
	WAY(exchange_within, setup_anon),
	WAY(regrown, setup_regrown),
	WAY(protect_none, setup_anon),
	WAY(protect_read, setup_anon),
	WAY(cut, setup_anon),
	WAY(clear_refs, setup_anon),
	WAY(thp, setup_thp),
	SAME(thp_drop),
	SAME(thp_protect),
	SAME(thp_move),
	SAME(thp_zero),
	SAME(thp_pageout),
	SAME(collapse_as_is),
	SAME(collapse),
	TWO(thp_exchange, setup_thp),
	{ "table_exchange", setup_table, way_thp_exchange, false, true, { 0 }, { 0 }, NULL },
	TWO(end_of_table, setup_end_of_table),
	WAY(hugetlb, setup_hugetlb_private),
	SAME(hugetlb_drop),
	{ "hugetlb_shared", setup_hugetlb_shared, way_hugetlb, false, false, { 0 }, { 0 }, NULL },
	WAY(ksm, setup_mergeable),
	WAY(ksm_zero, setup_mergeable),
	WAY(file_write, setup_private_file),
	WAY(file_drop, setup_private_file),
	{ "file_ksm_zero", setup_mergeable_file, way_ksm_zero, false, false, { 0 }, { 0 }, NULL },
	WAY(file_pageout, setup_private_file),
	WAY(file_changed, setup_private_file),
	WAY(file_truncated, setup_private_file),
	{ "deleted_changed", setup_private_deleted, way_file_changed, false, false, { 0 }, { 0 }, NULL },
	WAY(guard, setup_anon),
	LOOSE(droppable, setup_droppable),
	{ "wipe_on_fork", setup_wipe, way_fork, false, false, { 0 }, { 0 }, NULL },
	LOOSE(secret, setup_secret),
	WAY(own_uffd, setup_own_uffd),
};

#define COUNT (sizeof(ways) / sizeof(ways[0]))

static void setup_area(struct way *way, struct area *a)
{
	bool huge = !strncmp(way->name, "thp", 3) || !strncmp(way->name, "table", 5) ||
		    !strncmp(way->name, "hugetlb", 7) || way->act == way_aio_direct_at_full_speed;

	a->pages = huge ? HUGE_PAGES : PAGES;
	a->fd = a->other = -1;
	if (!way->loose)
		a->shadow = map_anon(a->pages * PAGE);
	way->setup(a);
	if (!a->at)
		a->pages = 0;
}

/* As /proc/self/mem gives it: protected pages too, and zeros where there is nothing to read. */
static bool area_holds(const char *name, const struct area *a)
{
	static char copy[PAGE];
	int fd = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
	bool good = true;

	for (size_t p = 0; a->shadow && p < a->pages; p++) {
		if (pread(fd, copy, PAGE, (off_t)(a->at + p * PAGE)) != (ssize_t)PAGE)
			memset(copy, 0, PAGE);
		if (!memcmp(copy, a->shadow + p * PAGE, PAGE))
			continue;
		fprintf(stderr, "%s: page %zu at %p is not what it must be\n", name, p,
			(void *)(a->at + p * PAGE));
		good = false;
	}
	close(fd);
	return good;
}

static bool check(void)
{
	bool good = true;

	for (size_t i = 0; i < COUNT; i++) {
		good &= area_holds(ways[i].name, &ways[i].area);
		good &= area_holds(ways[i].name, &ways[i].second);
	}
	return good;
}

static struct text text;

static void put_promise(const char *name, const struct area *a)
{
	if (!a->shadow || !a->pages)
		return;
	put(&text, "%s{\"way\": \"%s\", \"data\": %lu, \"shadow\": %lu, \"bytes\": %lu}",
	    text.length > 1 ? ", " : "", name, (uint64_t)a->at, (uint64_t)a->shadow,
	    a->pages * PAGE);
}

static void say_areas(void)
{
	text.length = 0;
	put(&text, "[");
	for (size_t i = 0; i < COUNT; i++) {
		put_promise(ways[i].name, &ways[i].area);
		put_promise(ways[i].name, &ways[i].second);
	}
	put(&text, "]");
	say("%s", text.bytes);
}

static void put_ways(void)
{
	text.length = 0;
	put(&text, "{\"pid\": %d, \"ways\": [", getpid());
	for (size_t i = 0; i < COUNT; i++)
		put(&text, "%s\"%s\"", i ? ", " : "", ways[i].name);
	put(&text, "]}");
}

static void obey(const char *line)
{
	for (size_t i = 0; i < COUNT; i++) {
		if (strcmp(ways[i].name, line))
			continue;
		const char *why = ways[i].act(ways[i].acts_on);

		ways[i].acts_on->turn++;
		if (!why)
			say("ok");
		else
			say("%s%s", strncmp(why, "cannot", 6) ? "bad " : "", why);
		return;
	}
	say("bad no such way: %s", line);
}

static void end_children(void)
{
	end_child(&before_watch);
	end_child(&busy);
	for (int i = 0; i < CHILDREN; i++)
		end_child(&staying[i]);
}

int main(int argc, char **argv)
{
	char line[256];

	target_begin(argc, argv);
	random_state = mix(option("--seed", 1));
	last_seed = option("--seed", 1) << 20;
	mallopt(M_MMAP_THRESHOLD, 0);
	start_helper();
	if (option("--ring", 1))
		ring_open(&ring, 8);
	syscall(SYS_io_setup, 4, &aio_context);
	for (size_t i = 0; i < COUNT; i++) {
		ways[i].acts_on = ways[i].setup ? &ways[i].area : ways[i - 1].acts_on;
		if (ways[i].setup)
			setup_area(&ways[i], &ways[i].area);
		if (ways[i].two) {
			ways[i].area.second = &ways[i].second;
			setup_area(&ways[i], &ways[i].second);
		}
	}
	register_fixed();
	put_ways();
	say_ready(&text);
	while (target_command(line, sizeof(line)))
		if (!strcmp(line, "areas"))
			say_areas();
		else if (!strcmp(line, "check"))
			say("%s", check() ? "ok" : "bad");
		else
			obey(line);
	bool good = check();

	end_children();
	_exit(good ? 0 : 1);
}
