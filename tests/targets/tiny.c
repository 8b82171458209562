/*
 * A small program that notices any disturbance: one thread whose registers hold a known pattern
 * and are compared in every turn, one thread that must never return from read(2), and a writer
 * of 8 MiB with a shadow copy.
 *
 * Options: --rate MB/s (4). Commands: check, stats.
 */
#include "shadow.h"

#include "registers.h"

#define BATCH 16
#define BYTES (8ul << 20)

static struct control control;
static struct area area;
static struct crew crew = CREW;

static uint64_t gpr[10];
static uint8_t vec[15][32];
static volatile int stop_registers;
static volatile uint64_t turns;
static volatile long disturbed; /* what register_loop() returned */
static volatile long returned;	/* how often read() did */
static volatile pid_t tids[3];

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

static bool check(void)
{
	crew_stop(&crew);
	bool good = shadow_agrees(&area);
	crew_go(&crew);

	if (disturbed)
		fprintf(stderr, "registers differ: comparison %ld in turn %lu\n", disturbed, turns);
	return good && !disturbed && !returned;
}

static void start(void *(*run)(void *), int i)
{
	pthread_t thread;

	errno = pthread_create(&thread, NULL, run, NULL);
	if (errno)
		die("pthread_create");
	while (!tids[i])
		sched_yield();
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
	area = (struct area){ map_anon(BYTES), map_anon(BYTES), BYTES / sizeof(uint64_t) };
	crew.members = 1;
	crew.going = true;
	start(hold_registers, 0);
	start(wait_in_read, 1);
	start(write_for_ever, 2);
	wait_blocked(tids[1]);

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
		else
			say("%s", !strcmp(line, "check") && check() ? "ok" : "bad");
	return check() ? 0 : 1;
}
