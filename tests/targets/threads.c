/*
 * Threads in functions, locals and system calls that a debugger can be asked about.
 *
 * Option: --threads N (6; the kinds are dealt in turn). Built without optimisation.
 * Commands: check.
 */
#include "target.h"

#include <linux/futex.h>
#include <sys/epoll.h>

#define MAX_THREADS 64

volatile long global_marker = 0x5eed;

static struct thread {
	const char *function;
	volatile long *marker;
	volatile pid_t tid;
} all[MAX_THREADS];

static volatile bool never;

/* The thread's number gives its marker; publishing the address lets the target check it. */
static void announce(long i, const char *function, volatile long *marker)
{
	all[i].function = function;
	all[i].marker = marker;
	__atomic_store_n(&all[i].tid, gettid(), __ATOMIC_RELEASE);
}

static void *worker_futex(void *number)
{
	volatile long local_marker = 0x1000 + (long)number;
	static int word;

	announce((long)number, __func__, &local_marker);
	while (!never)
		syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
	return NULL;
}

static void *worker_nanosleep(void *number)
{
	volatile long local_marker = 0x1000 + (long)number;

	announce((long)number, __func__, &local_marker);
	while (!never)
		nap_ms(3600000);
	return NULL;
}

static void *worker_read(void *number)
{
	volatile long local_marker = 0x1000 + (long)number;
	int ends[2];
	char byte;

	if (pipe(ends))
		die("pipe");
	announce((long)number, __func__, &local_marker);
	while (!never && read(ends[0], &byte, 1) <= 0)
		;
	return NULL;
}

static void *worker_epoll(void *number)
{
	volatile long local_marker = 0x1000 + (long)number;
	struct epoll_event event;
	int fd = epoll_create1(0);

	announce((long)number, __func__, &local_marker);
	while (!never && epoll_wait(fd, &event, 1, -1) <= 0)
		;
	return NULL;
}

static void *worker_poll(void *number)
{
	volatile long local_marker = 0x1000 + (long)number;

	announce((long)number, __func__, &local_marker);
	while (!never && poll(NULL, 0, -1) <= 0)
		;
	return NULL;
}

static void *worker_spin(void *number)
{
	volatile long local_marker = 0x1000 + (long)number;

	announce((long)number, __func__, &local_marker);
	while (local_marker == 0x1000 + (long)number)
		;
	return NULL;
}

static bool check(int threads)
{
	for (int i = 0; i < threads; i++)
		if (*all[i].marker != 0x1000 + i) {
			fprintf(stderr, "thread %d: marker is %#lx\n", i, *all[i].marker);
			return false;
		}
	return global_marker == 0x5eed;
}

int main(int argc, char **argv)
{
	static void *(*const kinds[])(void *) = { worker_futex, worker_nanosleep, worker_read,
						  worker_epoll, worker_poll,	  worker_spin };
	static struct text text;
	char line[256];

	target_begin(argc, argv);
	int threads = option("--threads", 6);
	if (threads > MAX_THREADS)
		threads = MAX_THREADS;
	put(&text, "{\"pid\": %d, \"global_marker\": %lu, \"threads\": [", getpid(),
	    (uint64_t)&global_marker);
	for (long i = 0; i < threads; i++) {
		pthread_t thread;

		errno = pthread_create(&thread, NULL, kinds[i % 6], (void *)i);
		if (errno)
			die("pthread_create");
		while (!__atomic_load_n(&all[i].tid, __ATOMIC_ACQUIRE))
			sched_yield();
		pthread_setname_np(thread, all[i].function + strlen("worker_"));
		if (kinds[i % 6] != worker_spin)
			wait_blocked(all[i].tid);
		put(&text, "%s{\"tid\": %d, \"function\": \"%s\", \"marker\": %ld, \"at\": %lu}",
		    i ? ", " : "", all[i].tid, all[i].function, 0x1000 + i,
		    (uint64_t)all[i].marker);
	}
	put(&text, "]}");
	say_ready(&text);
	while (target_command(line, sizeof(line)))
		say("%s", !strcmp(line, "check") && check(threads) ? "ok" : "bad");
	return check(threads) ? 0 : 1;
}
