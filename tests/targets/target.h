/*
 * What every target shares: the handshake with the harness, options, page patterns.
 *
 *     PROGRAM READY_FIFO [COMMAND_FIFO] [--option VALUE]...
 *
 * A target says "ready {json}" once it is set up, then obeys one-line commands, each answered by
 * one line on the ready FIFO: "ok ...", "bad ..." or JSON. "quit", SIGTERM and the end of the
 * command FIFO all end in the target's own check: exit status 0 when everything agrees, else 1
 * and a message on stderr; 2 means that it could not be set up.
 */
#ifndef TARGET_H
#define TARGET_H

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define PAGE_WORDS (PAGE / sizeof(uint64_t))

static int target_out = -1, target_in = -1;
static int target_argc;
static char **target_argv;
static volatile sig_atomic_t target_terminated;

static inline void target_on_term(int signal)
{
	(void)signal;
	target_terminated = 1;
}

static inline void mask_term(int how)
{
	sigset_t term;

	sigemptyset(&term);
	sigaddset(&term, SIGTERM);
	pthread_sigmask(how, &term, NULL);
}

/* Set-up failed: nothing to check. */
static inline void die(const char *what)
{
	fprintf(stderr, "%s: %s: %s\n", target_argv ? target_argv[0] : "target", what,
		strerror(errno));
	exit(2);
}

/* Text put together piece by piece without malloc, so that the heap stays as the target made it. */
struct text {
	char bytes[1 << 18];
	size_t length;
};

__attribute__((format(printf, 2, 3))) static inline void put(struct text *text, const char *format,
							     ...)
{
	size_t room = sizeof(text->bytes) - text->length;
	va_list args;

	va_start(args, format);
	int wrote = vsnprintf(text->bytes + text->length, room, format, args);
	va_end(args);
	if (wrote < 0 || (size_t)wrote >= room)
		die("text too long");
	text->length += wrote;
}

/* One line to the harness. Not by dprintf, which takes its buffer from the heap. */
__attribute__((format(printf, 1, 2))) static inline void say(const char *format, ...)
{
	static char line[sizeof(struct text)];
	va_list args;

	va_start(args, format);
	int length = vsnprintf(line, sizeof(line) - 1, format, args);
	va_end(args);
	if (length < 0 || (size_t)length >= sizeof(line) - 1)
		die("line too long");
	line[length++] = '\n';
	for (int wrote = 0; wrote < length;) {
		ssize_t part = write(target_out, line + wrote, length - wrote);

		if (part < 0 && errno != EINTR)
			die("say");
		wrote += part > 0 ? part : 0;
	}
}

/* SIGTERM stays blocked until say_ready(), so that threads started before never see it. */
static inline void target_begin(int argc, char **argv)
{
	struct sigaction act = { .sa_handler = target_on_term };

	target_argc = argc;
	target_argv = argv;
	if (argc < 2) {
		fprintf(stderr, "usage: %s READY_FIFO [COMMAND_FIFO] [--option VALUE]...\n",
			argv[0]);
		exit(2);
	}
	mask_term(SIG_BLOCK);
	sigaction(SIGTERM, &act, NULL);
	signal(SIGPIPE, SIG_IGN);
	target_out = open(argv[1], O_WRONLY | O_CLOEXEC);
	if (target_out < 0)
		die(argv[1]);
	if (argc > 2 && argv[2][0] != '-') {
		target_in = open(argv[2], O_RDONLY | O_CLOEXEC);
		if (target_in < 0)
			die(argv[2]);
	}
}

static inline void say_ready(const struct text *info)
{
	mask_term(SIG_UNBLOCK);
	say("ready %s", info->bytes);
}

static inline const char *option_text(const char *name, const char *fallback)
{
	for (int i = 2; i + 1 < target_argc; i++)
		if (!strcmp(target_argv[i], name))
			return target_argv[i + 1];
	return fallback;
}

static inline long option(const char *name, long fallback)
{
	const char *text = option_text(name, NULL);

	return text ? strtol(text, NULL, 0) : fallback;
}

/*
 * The next command, or false when it is time to check and exit. SIGTERM may come between looking
 * at the flag and waiting, so the wait is short. ppoll() or a signalfd would wait better, but the
 * one changes the signal mask and the other adds a descriptor, and both are looked at from outside.
 */
static inline bool target_command(char *line, size_t size)
{
	size_t length = 0;

	for (;;) {
		struct pollfd wait = { .fd = target_in, .events = POLLIN };
		int ready = poll(&wait, 1, 100);
		char byte;

		if (target_terminated)
			return false;
		if (ready == 0 || (ready < 0 && errno == EINTR))
			continue;
		if (ready < 0)
			die("poll");
		if (read(target_in, &byte, 1) != 1)
			return false;
		if (byte != '\n') {
			line[length] = byte;
			length += length + 1 < size;
			continue;
		}
		line[length] = 0;
		if (!strcmp(line, "quit")) {
			say("ok");
			return false;
		}
		return true;
	}
}

static inline uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15;
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
	x = (x ^ x >> 27) * 0x94d049bb133111eb;
	return x ^ x >> 31;
}

static inline uint64_t pattern_word(uint64_t seed, uint64_t page, uint64_t word)
{
	return word % 4 ? seed : mix(seed << 40 ^ page << 16 ^ word);
}

/* Fill page number `page` of an area; a quarter of the words is random, the rest compresses. */
static inline void pattern_write(void *at, uint64_t seed, uint64_t page)
{
	volatile uint64_t *words = at;

	for (uint64_t i = 0; i < PAGE_WORDS; i++)
		words[i] = pattern_word(seed, page, i);
}

static inline bool pattern_holds(const void *at, uint64_t seed, uint64_t page)
{
	const volatile uint64_t *words = at;

	for (uint64_t i = 0; i < PAGE_WORDS; i++)
		if (words[i] != pattern_word(seed, page, i))
			return false;
	return true;
}

static inline void nap_ms(long ms)
{
	struct timespec time = { ms / 1000, ms % 1000 * 1000000 };

	while (nanosleep(&time, &time) && errno == EINTR)
		;
}

/* Return once the thread is off the CPU inside a system call. */
static inline void wait_blocked(pid_t tid)
{
	char path[64], state[16] = "";

	snprintf(path, sizeof(path), "/proc/self/task/%d/syscall", tid);
	for (int tries = 0; tries < 10000; tries++, nap_ms(1)) {
		int fd = open(path, O_RDONLY | O_CLOEXEC);

		if (fd < 0)
			die(path);
		ssize_t got = read(fd, state, sizeof(state) - 1);
		close(fd);
		if (got > 0 && state[0] >= '0' && state[0] <= '9')
			return;
	}
	errno = ETIMEDOUT;
	die(path);
}

static inline void *map_anon(size_t bytes)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (at == MAP_FAILED)
		die("mmap");
	return at;
}

#endif
