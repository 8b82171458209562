/*
 * A small program that notices any disturbance: one thread whose registers hold a known pattern
 * and are compared in every turn, one thread that must never return from read(2), and a writer
 * of 8 MiB with a shadow copy. More threads that wait on request.
 *
 * Options: --rate MB/s (4), --mib S (8), --sleepers N (0). Commands: check, stats, write N (that
 * many pages, which nothing else writes, get new contents).
 */
#include "shadow.h"

#include <linux/futex.h>

#include "registers.h"

#define BATCH 16
#define OWN_PAGES 64
#define MAX_SLEEPERS 64

static struct control control;
static struct area area, own; /* the writer's, and what "write" writes */
static struct crew crew = CREW;

static uint64_t gpr[10];
static uint8_t vec[15][32];
static volatile int stop_registers;
static volatile uint64_t turns;
static volatile long disturbed; /* what register_loop() returned */
static volatile long returned;	/* how often waits did */
static volatile pid_t tids[3], sleeper_tids[MAX_SLEEPERS];

static void *hold_registers(void *unused)
{
	(void)unused;
	tids[0] = gettid();
	disturbed = __builtin_cpu_supports("avx")
			    ? register_loop_avx(gpr, vec, &stop_registers, &turns)
			    : register_loop_sse(gpr, vec, &stop_registers, &turns);
	return NULL;
}

static void *wait_in_read(void *unused)
{
	int ends[2];
	char byte;

	(void)unused;
	if (pipe2(ends, O_CLOEXEC))
		die("pipe");
	tids[1] = gettid();
	for (;;) {
		ssize_t got = read(ends[0], &byte, 1);

		if (returned++ == 0)
			fprintf(stderr, "read() returned %zd: %s\n", got, strerror(errno));
	}
	return NULL;
}

static void *sleep_for_ever(void *number)
{
	static uint32_t word;
	struct timespec hour = { 3600, 0 };
	int ends[2];
	char byte;

	if (pipe2(ends, O_CLOEXEC))
		die("pipe");
	__atomic_store_n(&sleeper_tids[(long)number], gettid(), __ATOMIC_RELEASE);
	for (;; returned++)
		if ((long)number % 3 == 0)
			syscall(SYS_nanosleep, &hour, NULL);
		else if ((long)number % 3 == 1)
			syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
		else if (read(ends[0], &byte, 1) < 0)
			continue;
	return NULL;
}

static void *write_for_ever(void *unused)
{
	int64_t due = now_ns(), step = BATCH * (PAGE * 1000ll) / option("--rate", 4);
	uint64_t random = mix(1);

	(void)unused;
	tids[2] = gettid();
	for (unsigned turn = 0;; turn++) {
		if (!crew.going)
			crew_wait(&crew);
		shadow_write(&area, &control, &random);
		if (turn % BATCH == 0)
			pace(&due, step);
	}
	return NULL;
}

static void write_own(long pages)
{
	static uint64_t value;

	for (size_t i = 0; i < (size_t)pages % (OWN_PAGES + 1); i++)
		own.shadow[i * PAGE_WORDS] = own.data[i * PAGE_WORDS] = mix(value++);
}

static bool check(void)
{
	crew_stop(&crew);
	bool good = shadow_agrees(&area) && shadow_agrees(&own);
	crew_go(&crew);

	if (disturbed)
		fprintf(stderr, "registers differ: comparison %ld in turn %lu\n", disturbed, turns);
	return good && !disturbed && !returned;
}

static void start(void *(*run)(void *), void *arg, volatile pid_t *tid)
{
	pthread_t thread;

	errno = pthread_create(&thread, NULL, run, arg);
	if (errno)
		die("pthread_create");
	while (!*tid)
		sched_yield();
}

static void start_sleepers(long count)
{
	if (count > MAX_SLEEPERS)
		count = MAX_SLEEPERS;
	for (long i = 0; i < count; i++) {
		start(sleep_for_ever, (void *)i, &sleeper_tids[i]);
		wait_blocked(sleeper_tids[i]);
	}
}

int main(int argc, char **argv)
{
	static struct text text;
	char line[256];

	target_begin(argc, argv);
	for (int i = 0; i < 10; i++)
		gpr[i] = mix(100 + i);
	for (int i = 0; i < 15 * 32; i++)
		vec[i / 32][i % 32] = (uint8_t)mix(i);
	size_t bytes = option("--mib", 8) << 20;
	area = (struct area){ map_anon(bytes), map_anon(bytes), bytes / sizeof(uint64_t) };
	own = (struct area){ map_anon(OWN_PAGES * PAGE), map_anon(OWN_PAGES * PAGE),
			     OWN_PAGES * PAGE_WORDS };
	crew.members = 1;
	crew.going = true;
	start(hold_registers, NULL, &tids[0]);
	start(wait_in_read, NULL, &tids[1]);
	start(write_for_ever, NULL, &tids[2]);
	wait_blocked(tids[1]);
	start_sleepers(option("--sleepers", 0));

	put(&text,
	    "{\"pid\": %d, \"tids\": {\"registers\": %d, \"reader\": %d, \"writer\": %d}, "
	    "\"control\": [%lu], \"areas\": [",
	    getpid(), tids[0], tids[1], tids[2], (uint64_t)&control);
	put_area(&text, &area);
	put(&text, "]}");
	say_ready(&text);
	while (target_command(line, sizeof(line)))
		if (!strcmp(line, "stats"))
			say("{\"writes\": %lu, \"turns\": %lu}", control.writes, turns);
		else if (!strncmp(line, "write ", 6)) {
			write_own(atol(line + 6));
			say("ok");
		} else
			say("%s", !strcmp(line, "check") && check() ? "ok" : "bad");
	return check() ? 0 : 1;
}
