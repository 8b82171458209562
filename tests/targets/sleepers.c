/*
 * Threads that each wait in one system call and count every return of it.
 *
 * A watcher that stops the process must cause no return at all. Each call is made directly, with
 * a time-out of hours where it takes one, so a return is either asked for ("wake") or spurious.
 * Commands: report (JSON: name -> tid, returns, value, errno), wake NAME.
 * Option: --main NAME: only that one, and it is the first thread.
 */
#include "target.h"

#include <linux/aio_abi.h>
#include <linux/futex.h>
#include <linux/io_uring.h>
#include <mqueue.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/un.h>

#define HOUR_MS 3600000
#define HOUR ((struct timespec){ HOUR_MS / 1000, 0 })
#define ENOUGH 100 /* a call that keeps returning is broken; count no further */

struct sleeper {
	const char *name;
	long (*call)(struct sleeper *);
	void (*setup)(struct sleeper *);
	void (*wake)(struct sleeper *);
	int fd, other; /* what it waits on, and what wakes it */
	uint32_t word;
	pthread_t thread;
	volatile pid_t tid;
	volatile long returns, value;
	volatile int error;
	long asked;
};

static pid_t janitor;
static int janitor_ends[2];

/* --- waiting for time --- */

static long do_nanosleep(struct sleeper *s)
{
	(void)s;
	return syscall(SYS_nanosleep, &HOUR, NULL);
}

static long do_clock_nanosleep(struct sleeper *s)
{
	(void)s;
	return syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &HOUR, NULL);
}

static long do_clock_nanosleep_until(struct sleeper *s)
{
	struct timespec at;

	(void)s;
	clock_gettime(CLOCK_REALTIME, &at);
	at.tv_sec += HOUR_MS / 1000;
	return syscall(SYS_clock_nanosleep, CLOCK_REALTIME, TIMER_ABSTIME, &at, NULL);
}

/* --- futex --- */

static long do_futex(struct sleeper *s)
{
	return syscall(SYS_futex, &s->word, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
}

static long do_futex_timeout(struct sleeper *s)
{
	return syscall(SYS_futex, &s->word, FUTEX_WAIT_PRIVATE, 0, &HOUR, NULL, 0);
}

static long do_futex_until(struct sleeper *s)
{
	struct timespec at;

	clock_gettime(CLOCK_MONOTONIC, &at);
	at.tv_sec += HOUR_MS / 1000;
	return syscall(SYS_futex, &s->word, FUTEX_WAIT_BITSET_PRIVATE, 0, &at, NULL,
		       FUTEX_BITSET_MATCH_ANY);
}

static long do_futex_waitv(struct sleeper *s)
{
	struct futex_waitv wait = { .uaddr = (uint64_t)&s->word,
				    .flags = FUTEX_32 | FUTEX_PRIVATE_FLAG };

	return syscall(SYS_futex_waitv, &wait, 1, 0, NULL, 0);
}

/* From Linux 5.16 on. */
static void setup_waitv(struct sleeper *s)
{
	if (syscall(SYS_futex_waitv, NULL, 0, 0, NULL, 0) < 0 && errno == ENOSYS)
		s->fd = -1;
}

static void wake_futex(struct sleeper *s)
{
	syscall(SYS_futex, &s->word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

/* --- descriptors: a pipe, or an event counter, made readable by writing eight bytes --- */

static void setup_pipe(struct sleeper *s)
{
	int ends[2];

	if (pipe2(ends, O_CLOEXEC))
		die("pipe");
	s->fd = ends[0];
	s->other = ends[1];
}

static void setup_eventfd(struct sleeper *s)
{
	s->fd = s->other = eventfd(0, EFD_CLOEXEC);
}

static void wake_by_writing(struct sleeper *s)
{
	uint64_t one = 1;

	if (write(s->other, &one, sizeof(one)) != sizeof(one))
		die(s->name);
}

/* Take what woke us, so that the next wait waits. */
static long drained(struct sleeper *s, long result)
{
	uint64_t word;
	int error = errno;

	if (result > 0 && read(s->fd, &word, sizeof(word)) < 0)
		die(s->name);
	errno = error;
	return result;
}

static long do_read(struct sleeper *s)
{
	char event[64];

	return read(s->fd, event, sizeof(event));
}

static long do_poll(struct sleeper *s)
{
	struct pollfd wait = { .fd = s->fd, .events = POLLIN };

	return drained(s, syscall(SYS_poll, &wait, 1, -1));
}

static long do_poll_timeout(struct sleeper *s)
{
	struct pollfd wait = { .fd = s->fd, .events = POLLIN };

	return drained(s, syscall(SYS_poll, &wait, 1, HOUR_MS));
}

static long do_ppoll(struct sleeper *s)
{
	struct pollfd wait = { .fd = s->fd, .events = POLLIN };

	return drained(s, syscall(SYS_ppoll, &wait, 1, &HOUR, NULL, 0));
}

static long do_select(struct sleeper *s)
{
	struct timeval timeout = { HOUR_MS / 1000, 0 };
	fd_set set;

	FD_ZERO(&set);
	FD_SET(s->fd, &set);
	return drained(s, syscall(SYS_select, s->fd + 1, &set, NULL, NULL, &timeout));
}

static long do_pselect(struct sleeper *s)
{
	fd_set set;

	FD_ZERO(&set);
	FD_SET(s->fd, &set);
	return drained(s, syscall(SYS_pselect6, s->fd + 1, &set, NULL, NULL, NULL, NULL));
}

/* With a signal mask of their own, under which SIGUSR1 may come. */

static const sigset_t *usr1_may_come(void)
{
	static sigset_t set;

	sigfillset(&set);
	sigdelset(&set, SIGUSR1);
	return &set;
}

static long do_ppoll_mask(struct sleeper *s)
{
	struct pollfd wait = { .fd = s->fd, .events = POLLIN };

	return syscall(SYS_ppoll, &wait, 1, NULL, usr1_may_come(), 8);
}

static long do_pselect_mask(struct sleeper *s)
{
	struct {
		const sigset_t *set;
		size_t size;
	} mask = { usr1_may_come(), 8 };
	fd_set set;

	FD_ZERO(&set);
	FD_SET(s->fd, &set);
	return syscall(SYS_pselect6, s->fd + 1, &set, NULL, NULL, NULL, &mask);
}

static void setup_full_pipe(struct sleeper *s)
{
	static char page[PAGE];

	setup_pipe(s);
	fcntl(s->other, F_SETFL, O_NONBLOCK);
	while (write(s->other, page, PAGE) > 0)
		;
	fcntl(s->other, F_SETFL, 0);
}

static long do_write(struct sleeper *s)
{
	char byte = 0;

	return write(s->other, &byte, 1);
}

/* For epoll, `word` keeps the epoll descriptor beside the counter it watches. */
static void setup_epoll(struct sleeper *s)
{
	struct epoll_event event = { .events = EPOLLIN };

	setup_eventfd(s);
	s->word = epoll_create1(EPOLL_CLOEXEC);
	if (epoll_ctl((int)s->word, EPOLL_CTL_ADD, s->fd, &event))
		die("epoll_ctl");
}

static long do_epoll_wait(struct sleeper *s)
{
	struct epoll_event event;

	return drained(s, syscall(SYS_epoll_wait, s->word, &event, 1, -1));
}

static long do_epoll_wait_timeout(struct sleeper *s)
{
	struct epoll_event event;

	return drained(s, syscall(SYS_epoll_wait, s->word, &event, 1, HOUR_MS));
}

static long do_epoll_pwait(struct sleeper *s)
{
	struct epoll_event event;

	return drained(s, syscall(SYS_epoll_pwait, s->word, &event, 1, -1, NULL, 0));
}

static long do_epoll_pwait_mask(struct sleeper *s)
{
	struct epoll_event event;

	return syscall(SYS_epoll_pwait, s->word, &event, 1, -1, usr1_may_come(), 8);
}

/* From Linux 5.11 on. */
static void setup_epoll_pwait2(struct sleeper *s)
{
	setup_epoll(s);
	if (syscall(SYS_epoll_pwait2, -1, NULL, 0, NULL, NULL, 0) < 0 && errno == ENOSYS)
		s->fd = -1;
}

static long do_epoll_pwait2(struct sleeper *s)
{
	struct epoll_event event;

	return drained(s, syscall(SYS_epoll_pwait2, s->word, &event, 1, &HOUR, NULL, 0));
}

static void setup_timerfd(struct sleeper *s)
{
	struct itimerspec at = { .it_value = HOUR };

	s->fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
	timerfd_settime(s->fd, 0, &at, NULL);
}

static void setup_inotify(struct sleeper *s)
{
	s->fd = inotify_init1(IN_CLOEXEC);
}

static long do_read_signalfd(struct sleeper *s)
{
	struct signalfd_siginfo info;

	return read(s->fd, &info, sizeof(info));
}

static void setup_signalfd(struct sleeper *s)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGWINCH);
	s->fd = signalfd(-1, &set, SFD_CLOEXEC);
}

/* --- sockets --- */

static void setup_pair(struct sleeper *s)
{
	int ends[2];

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends))
		die("socketpair");
	s->fd = ends[0];
	s->other = ends[1];
}

static void set_timeout(struct sleeper *s)
{
	struct timeval timeout = { HOUR_MS / 1000, 0 };

	if (setsockopt(s->fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout)))
		die("SO_RCVTIMEO");
}

static void setup_pair_timeout(struct sleeper *s)
{
	setup_pair(s);
	set_timeout(s);
}

static long do_recv(struct sleeper *s)
{
	uint64_t word;

	return recv(s->fd, &word, sizeof(word), 0);
}

static long do_recvmsg(struct sleeper *s)
{
	uint64_t word;
	struct iovec part = { &word, sizeof(word) };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };

	return recvmsg(s->fd, &message, 0);
}

static long do_recvmmsg(struct sleeper *s)
{
	uint64_t word;
	struct iovec part = { &word, sizeof(word) };
	struct mmsghdr message = { .msg_hdr = { .msg_iov = &part, .msg_iovlen = 1 } };

	return recvmmsg(s->fd, &message, 1, 0, NULL);
}

static void setup_listener(struct sleeper *s)
{
	struct sockaddr_un any = { .sun_family = AF_UNIX };

	s->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	/* Only the family: the kernel picks an unused abstract name. */
	if (bind(s->fd, (struct sockaddr *)&any, sizeof(any.sun_family)) || listen(s->fd, 4))
		die("listen");
}

static void setup_listener_timeout(struct sleeper *s)
{
	setup_listener(s);
	set_timeout(s);
}

static long do_accept(struct sleeper *s)
{
	int fd = accept4(s->fd, NULL, NULL, SOCK_CLOEXEC);
	int error = errno;

	if (fd >= 0)
		close(fd);
	errno = error;
	return fd;
}

static void wake_accept(struct sleeper *s)
{
	struct sockaddr_un at;
	socklen_t length = sizeof(at);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (getsockname(s->fd, (struct sockaddr *)&at, &length) ||
	    connect(fd, (struct sockaddr *)&at, length))
		die("connect");
	close(fd);
}

/* Connecting to a listener whose backlog is full; accepting one makes room. */
static void setup_full_listener(struct sleeper *s)
{
	struct sockaddr_un at = { .sun_family = AF_UNIX };
	socklen_t length = sizeof(at);
	int fd;

	s->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (bind(s->fd, (struct sockaddr *)&at, sizeof(at.sun_family)) || listen(s->fd, 0) ||
	    getsockname(s->fd, (struct sockaddr *)&at, &length))
		die("listen");
	do
		fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	while (!connect(fd, (struct sockaddr *)&at, length));
	close(fd);
	s->other = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
}

static void setup_full_listener_timeout(struct sleeper *s)
{
	struct timeval timeout = { HOUR_MS / 1000, 0 };

	setup_full_listener(s);
	if (setsockopt(s->other, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout)))
		die("SO_SNDTIMEO");
}

static long do_connect(struct sleeper *s)
{
	struct sockaddr_un at;
	socklen_t length = sizeof(at);

	if (getsockname(s->fd, (struct sockaddr *)&at, &length))
		die("getsockname");
	return connect(s->other, (struct sockaddr *)&at, length);
}

/* --- signals --- */

static long do_pause(struct sleeper *s)
{
	(void)s;
	return pause();
}

static long do_sigsuspend(struct sleeper *s)
{
	sigset_t set;

	(void)s;
	sigfillset(&set);
	sigdelset(&set, SIGUSR1);
	return sigsuspend(&set);
}

static long wait_usr2(const struct timespec *timeout)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	return syscall(SYS_rt_sigtimedwait, &set, NULL, timeout, 8);
}

static long do_sigtimedwait(struct sleeper *s)
{
	(void)s;
	return wait_usr2(&HOUR);
}

static long do_sigwaitinfo(struct sleeper *s)
{
	(void)s;
	return wait_usr2(NULL);
}

static void wake_by_usr1(struct sleeper *s)
{
	pthread_kill(s->thread, SIGUSR1);
}

static void wake_by_usr2(struct sleeper *s)
{
	pthread_kill(s->thread, SIGUSR2);
}

static void on_usr1(int signal)
{
	(void)signal;
}

/* --- System V --- */

static int sem_ids[2], msg_ids[2], ipc_count[2];

static void setup_sem(struct sleeper *s)
{
	s->fd = sem_ids[ipc_count[0]++] = semget(IPC_PRIVATE, 1, IPC_CREAT | 0600);
	if (s->fd < 0)
		die("semget");
}

static long do_semop(struct sleeper *s)
{
	struct sembuf take = { 0, -1, 0 };

	return syscall(SYS_semop, s->fd, &take, 1);
}

static long do_semtimedop(struct sleeper *s)
{
	struct sembuf take = { 0, -1, 0 };

	return syscall(SYS_semtimedop, s->fd, &take, 1, &HOUR);
}

static void wake_sem(struct sleeper *s)
{
	struct sembuf give = { 0, 1, 0 };

	semop(s->fd, &give, 1);
}

struct message {
	long type;
	char body[1024];
};

static void setup_msg(struct sleeper *s)
{
	s->fd = msg_ids[ipc_count[1]++] = msgget(IPC_PRIVATE, IPC_CREAT | 0600);
	if (s->fd < 0)
		die("msgget");
}

static void setup_full_msg(struct sleeper *s)
{
	struct message message = { .type = 1 };

	setup_msg(s);
	while (!msgsnd(s->fd, &message, sizeof(message.body), IPC_NOWAIT))
		;
}

static long do_msgrcv(struct sleeper *s)
{
	struct message message;

	return msgrcv(s->fd, &message, sizeof(message.body), 0, 0);
}

static long do_msgsnd(struct sleeper *s)
{
	struct message message = { .type = 1 };

	return msgsnd(s->fd, &message, sizeof(message.body), 0);
}

static void wake_msgrcv(struct sleeper *s)
{
	struct message message = { .type = 1 };

	msgsnd(s->fd, &message, 1, 0);
}

static void wake_msgsnd(struct sleeper *s)
{
	do_msgrcv(s);
}

static void setup_mqueue(struct sleeper *s)
{
	struct mq_attr attributes = { .mq_maxmsg = 1, .mq_msgsize = 8 };
	char name[32];

	snprintf(name, sizeof(name), "/sleepers-%d", getpid());
	s->fd = mq_open(name, O_RDWR | O_CREAT | O_CLOEXEC, 0600, &attributes);
	mq_unlink(name);
}

static long do_mq_timedreceive(struct sleeper *s)
{
	struct timespec at;
	char body[8];

	clock_gettime(CLOCK_REALTIME, &at);
	at.tv_sec += HOUR_MS / 1000;
	return mq_timedreceive(s->fd, body, sizeof(body), NULL, &at);
}

static void wake_mq(struct sleeper *s)
{
	mq_send(s->fd, "12345678", 8, 0);
}

/* --- the rest --- */

static aio_context_t aio_context;

static void setup_aio(struct sleeper *s)
{
	(void)s;
	if (syscall(SYS_io_setup, 1, &aio_context))
		die("io_setup");
}

static long do_io_getevents(struct sleeper *s)
{
	struct io_event event;

	(void)s;
	return syscall(SYS_io_getevents, aio_context, 1, 1, &event, &HOUR);
}

static long do_io_pgetevents(struct sleeper *s)
{
	struct {
		const sigset_t *set;
		size_t size;
	} mask = { usr1_may_come(), 8 };
	struct io_event event;

	(void)s;
	return syscall(SYS_io_pgetevents, aio_context, 1, 1, &event, &HOUR, &mask);
}

static void setup_uring(struct sleeper *s)
{
	struct io_uring_params params = { 0 };

	s->fd = syscall(SYS_io_uring_setup, 4, &params); /* negative where it is switched off */
}

static long do_io_uring_enter(struct sleeper *s)
{
	return syscall(SYS_io_uring_enter, s->fd, 0, 1, IORING_ENTER_GETEVENTS, NULL, 0);
}

static void setup_lock(struct sleeper *s)
{
	char path[64];

	s->other = memfd_create("lock", MFD_CLOEXEC);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", s->other);
	s->fd = open(path, O_RDWR | O_CLOEXEC);
	if (s->fd < 0 || flock(s->other, LOCK_EX))
		die("flock");
}

static long do_flock(struct sleeper *s)
{
	return flock(s->fd, LOCK_EX);
}

static long do_ofd_lock(struct sleeper *s)
{
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };

	return fcntl(s->fd, F_OFD_SETLKW, &lock);
}

static void setup_ofd_lock(struct sleeper *s)
{
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };

	setup_lock(s);
	if (fcntl(s->other, F_OFD_SETLK, &lock))
		die("fcntl");
}

static long do_waitid(struct sleeper *s)
{
	siginfo_t info;

	(void)s;
	return waitid(P_PID, janitor, &info, WEXITED | WSTOPPED | WCONTINUED);
}

static long do_wait4(struct sleeper *s)
{
	(void)s;
	return waitpid(janitor, NULL, 0);
}

#define TIME(name) { #name, do_##name, NULL, NULL, .fd = 0 }
#define ON(name, call, setup, wake) { #name, do_##call, setup, wake, .fd = 0 }

static struct sleeper sleepers[] = {
	TIME(nanosleep),
	TIME(clock_nanosleep),
	TIME(clock_nanosleep_until),
	ON(futex, futex, NULL, wake_futex),
	ON(futex_timeout, futex_timeout, NULL, wake_futex),
	ON(futex_until, futex_until, NULL, wake_futex),
	ON(futex_waitv, futex_waitv, setup_waitv, wake_futex),
	ON(read_pipe, read, setup_pipe, wake_by_writing),
	ON(read_eventfd, read, setup_eventfd, wake_by_writing),
	ON(read_timerfd, read, setup_timerfd, NULL),
	ON(read_inotify, read, setup_inotify, NULL),
	ON(read_signalfd, read_signalfd, setup_signalfd, NULL),
	ON(write_pipe, write, setup_full_pipe, NULL),
	ON(poll, poll, setup_pipe, wake_by_writing),
	ON(poll_timeout, poll_timeout, setup_pipe, wake_by_writing),
	ON(ppoll_timeout, ppoll, setup_pipe, wake_by_writing),
	ON(ppoll_mask, ppoll_mask, setup_pipe, wake_by_usr1),
	ON(pselect_mask, pselect_mask, setup_pipe, wake_by_usr1),
	ON(select_timeout, select, setup_pipe, wake_by_writing),
	ON(pselect, pselect, setup_pipe, wake_by_writing),
	ON(epoll_wait, epoll_wait, setup_epoll, wake_by_writing),
	ON(epoll_wait_timeout, epoll_wait_timeout, setup_epoll, wake_by_writing),
	ON(epoll_pwait, epoll_pwait, setup_epoll, wake_by_writing),
	ON(epoll_pwait_mask, epoll_pwait_mask, setup_epoll, wake_by_usr1),
	ON(epoll_pwait2_timeout, epoll_pwait2, setup_epoll_pwait2, wake_by_writing),
	ON(recv, recv, setup_pair, wake_by_writing),
	ON(recv_timeout, recv, setup_pair_timeout, wake_by_writing),
	ON(recvmsg_timeout, recvmsg, setup_pair_timeout, wake_by_writing),
	ON(recvmmsg, recvmmsg, setup_pair, wake_by_writing),
	ON(recvmmsg_timeout, recvmmsg, setup_pair_timeout, wake_by_writing),
	ON(connect, connect, setup_full_listener, NULL),
	ON(connect_timeout, connect, setup_full_listener_timeout, NULL),
	ON(accept, accept, setup_listener, wake_accept),
	ON(accept_timeout, accept, setup_listener_timeout, wake_accept),
	ON(pause, pause, NULL, wake_by_usr1),
	ON(sigsuspend, sigsuspend, NULL, wake_by_usr1),
	ON(sigtimedwait, sigtimedwait, NULL, wake_by_usr2),
	ON(sigwaitinfo, sigwaitinfo, NULL, wake_by_usr2),
	ON(semop, semop, setup_sem, wake_sem),
	ON(semtimedop, semtimedop, setup_sem, wake_sem),
	ON(msgrcv, msgrcv, setup_msg, wake_msgrcv),
	ON(msgsnd, msgsnd, setup_full_msg, wake_msgsnd),
	ON(mq_timedreceive, mq_timedreceive, setup_mqueue, wake_mq),
	ON(io_getevents, io_getevents, setup_aio, NULL),
	ON(io_pgetevents, io_pgetevents, NULL, wake_by_usr1),
	ON(io_uring_enter, io_uring_enter, setup_uring, NULL),
	ON(flock, flock, setup_lock, NULL),
	ON(ofd_lock, ofd_lock, setup_ofd_lock, NULL),
	TIME(wait4),
	TIME(waitid),
};

#define COUNT (sizeof(sleepers) / sizeof(sleepers[0]))

static void *sleep_for_ever(void *arg)
{
	struct sleeper *me = arg;
	sigset_t set;

	/* Cut within a letter, as the kernel cuts names. */
	prctl(PR_SET_NAME, "Hintergrundr\xc3");
	sigfillset(&set);
	if (me->call == do_pause)
		sigdelset(&set, SIGUSR1);
	pthread_sigmask(SIG_SETMASK, &set, NULL);
	__atomic_store_n(&me->tid, gettid(), __ATOMIC_RELEASE);
	while (me->returns < ENOUGH) {
		long value = me->call(me);

		me->error = value < 0 ? errno : 0;
		me->value = value;
		__atomic_add_fetch(&me->returns, 1, __ATOMIC_RELEASE);
	}
	for (;;)
		pause();
	return NULL;
}

/* System V objects outlive a killed process: a child sees the pipe close and removes them. */
static void start_janitor(void)
{
	char byte;

	if (pipe2(janitor_ends, O_CLOEXEC) || (janitor = fork()) < 0)
		die("janitor");
	if (janitor)
		return;
	close(janitor_ends[1]);
	while (read(janitor_ends[0], &byte, 1) < 0)
		;
	for (int i = 0; i < 2; i++) {
		semctl(sem_ids[i], 0, IPC_RMID);
		msgctl(msg_ids[i], IPC_RMID, NULL);
	}
	_exit(0);
}

/* A thread that was just resumed may not have counted its return yet. */
static void settle(void)
{
	for (size_t i = 0; i < COUNT; i++)
		if (sleepers[i].tid)
			wait_blocked(sleepers[i].tid);
}

static const struct text *report(void)
{
	static struct text text;
	const char *comma = "";

	settle();
	text.length = 0;
	put(&text, "{");
	for (size_t i = 0; i < COUNT; i++) {
		struct sleeper *s = &sleepers[i];

		if (!s->tid)
			continue;
		put(&text,
		    "%s\"%s\": {\"tid\": %d, \"returns\": %ld, \"value\": %ld, \"errno\": %d, "
		    "\"asked\": %ld, \"can_wake\": %s}",
		    comma, s->name, s->tid, s->returns, s->value, s->error, s->asked,
		    s->wake ? "true" : "false");
		comma = ", ";
	}
	put(&text, "}");
	return &text;
}

/* Wake one, and see it return with success (pause and sigsuspend: EINTR) and wait again. */
static bool wake(const char *name)
{
	for (size_t i = 0; i < COUNT; i++) {
		struct sleeper *s = &sleepers[i];
		long before = s->returns;

		if (strcmp(s->name, name) || !s->wake || !s->tid)
			continue;
		s->asked++;
		s->wake(s);
		for (int tries = 0; tries < 10000 && s->returns == before; tries++)
			nap_ms(1);
		if (s->returns != before + 1)
			return false;
		wait_blocked(s->tid);
		return s->value >= 0 || s->wake == wake_by_usr1;
	}
	return false;
}

static bool check(void)
{
	bool good = true;

	settle();
	for (size_t i = 0; i < COUNT; i++)
		if (sleepers[i].returns != sleepers[i].asked) {
			fprintf(stderr,
				"%s returned %ld times, woken %ld times, last with %ld (%s)\n",
				sleepers[i].name, sleepers[i].returns, sleepers[i].asked,
				sleepers[i].value, strerror(sleepers[i].error));
			good = false;
		}
	return good;
}

_Noreturn static void serve(void)
{
	char line[256];

	say_ready(report());
	while (target_command(line, sizeof(line)))
		if (!strcmp(line, "report"))
			say("%s", report()->bytes);
		else
			say("%s", !strncmp(line, "wake ", 5) && wake(line + 5) ? "ok" : "bad");
	_exit(check() ? 0 : 1);
}

static void *serve_in_thread(void *main_sleeper)
{
	struct sleeper *s = main_sleeper;

	while (!__atomic_load_n(&s->tid, __ATOMIC_ACQUIRE))
		sched_yield();
	serve();
}

/* The first thread sleeps, another obeys commands. */
static void sleep_in_main(const char *name)
{
	pthread_t thread;

	for (size_t i = 0; i < COUNT; i++)
		if (!strcmp(sleepers[i].name, name)) {
			sleepers[i].thread = pthread_self();
			errno = pthread_create(&thread, NULL, serve_in_thread, &sleepers[i]);
			if (errno)
				die("pthread_create");
			sleep_for_ever(&sleepers[i]);
		}
	die(name);
}

int main(int argc, char **argv)
{
	target_begin(argc, argv);
	signal(SIGUSR1, on_usr1);
	for (size_t i = 0; i < COUNT; i++)
		if (sleepers[i].setup)
			sleepers[i].setup(&sleepers[i]);
	start_janitor();
	if (option_text("--main", NULL))
		sleep_in_main(option_text("--main", NULL));
	for (size_t i = 0; i < COUNT; i++) {
		struct sleeper *s = &sleepers[i];

		if (s->fd < 0)
			continue;
		errno = pthread_create(&s->thread, NULL, sleep_for_ever, s);
		if (errno)
			die("pthread_create");
		while (!__atomic_load_n(&s->tid, __ATOMIC_ACQUIRE))
			sched_yield();
		wait_blocked(s->tid);
	}
	serve();
}
