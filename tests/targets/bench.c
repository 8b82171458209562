/*
 * What scripts/bench measures with: resident pages that compress to half, written on command or at
 * a steady rate, and a clock that tells how long the program was kept from running.
 *
 * Options: --mib S (64), --tick US (200).
 * Commands: random N (write N pages, none twice), run N (write N pages in a row), write MB/s (write
 * whole random pages from now on; 0: stop, answer pages and nanoseconds), touch N (write a word of N
 * pages in a row, answer nanoseconds), gap (the longest time
 * between two ticks since the last "gap", and the longest without what was spent waiting for a
 * processor, in nanoseconds). There is nothing to check at the end.
 */
#include "shadow.h"

#define BATCH 16

static uint8_t *data;
static uint64_t pages, mask;
static int shift;
static uint64_t rounds; /* of commands, so that no two choose the same pages */

static pthread_mutex_t tick_lock = PTHREAD_MUTEX_INITIALIZER;
static struct gap { int64_t all, off; } longest; /* off: neither running nor ready to run */
static volatile uint64_t ticks;

static struct crew crew = CREW;
static volatile int64_t step; /* ns a batch */
static volatile uint64_t written;

/* Half random, half zeros. */
static void write_page(uint64_t page, uint64_t *random)
{
	volatile uint64_t *words = (uint64_t *)(data + page * PAGE);

	for (uint64_t i = 0; i < PAGE_WORDS; i++)
		words[i] = i < PAGE_WORDS / 2 ? next_random(random) : 0;
}

/*
 * The i-th page of an order that `salt` chooses, in which each comes once. A table would do too,
 * but shuffling it would write pages of its own. Each step below can be undone, so together they
 * permute the numbers of so many bits; from one that is no page they go on to one that is.
 */
static uint64_t shuffled(uint64_t i, uint64_t salt)
{
	do {
		i = ((i ^ salt) & mask) * 0x9e3779b97f4a7c15 & mask;
		i ^= i >> shift;
		i = i * 0xbf58476d1ce4e5b9 & mask;
		i ^= i >> shift;
	} while (i >= pages);
	return i;
}

/* How many nanoseconds it took. */
static int64_t write_pages(uint64_t count, bool scattered)
{
	int64_t began = now_ns();
	uint64_t salt = mix(++rounds), random = salt | 1;
	uint64_t first = salt % (pages - count + 1);

	for (uint64_t i = 0; i < count; i++)
		write_page(scattered ? shuffled(i, salt) : first + i, &random);
	return now_ns() - began;
}

static int64_t touch_pages(uint64_t count)
{
	int64_t began = now_ns();

	for (uint64_t i = 0; i < count; i++)
		*(volatile uint64_t *)(data + i * PAGE) += 1;
	return now_ns() - began;
}

static void *write_for_ever(void *unused)
{
	uint64_t random = mix(~0ull);
	int64_t due = now_ns();

	(void)unused;
	for (;;) {
		if (!crew.going) {
			crew_wait(&crew);
			due = now_ns();
		}
		for (int i = 0; i < BATCH; i++)
			write_page(next_random(&random) % pages, &random);
		written += BATCH;
		pace(&due, step);
	}
	return NULL;
}

/* What this thread has spent waiting for a processor; 0 where the kernel does not tell. */
static int64_t queued_ns(int schedstat)
{
	char text[96];
	long run, queued = 0;
	ssize_t got = pread(schedstat, text, sizeof(text) - 1, 0);

	text[got > 0 ? got : 0] = 0;
	return sscanf(text, "%ld %ld", &run, &queued) == 2 ? queued : 0;
}

static int64_t larger(int64_t a, int64_t b)
{
	return a > b ? a : b;
}

/* Sleeping and not spinning, so as not to take a processor from those that are measured. */
static void *tick_for_ever(void *unused)
{
	const struct timespec nap = { 0, option("--tick", 200) * 1000 };
	int schedstat = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
	int64_t before = now_ns(), queued_before = queued_ns(schedstat);

	(void)unused;
	prctl(PR_SET_TIMERSLACK, 1ul);
	for (;;) {
		nanosleep(&nap, NULL);
		pthread_mutex_lock(&tick_lock);
		int64_t now = now_ns(), queued = queued_ns(schedstat), gap = now - before;

		longest.all = larger(longest.all, gap);
		longest.off = larger(longest.off, gap - (queued - queued_before));
		before = now;
		queued_before = queued;
		ticks++;
		pthread_mutex_unlock(&tick_lock);
	}
	return NULL;
}

/* This thread may run again before the ticking one does: the gap to report would not be over. */
static struct gap take_longest(void)
{
	for (uint64_t before = ticks; ticks < before + 2;)
		nap_ms(1);
	pthread_mutex_lock(&tick_lock);
	struct gap gap = longest;

	longest = (struct gap){ 0 };
	pthread_mutex_unlock(&tick_lock);
	return gap;
}

static void write_at(long rate)
{
	static int64_t since;

	crew_stop(&crew);
	if (rate <= 0) {
		say("ok %lu %ld", written, now_ns() - since);
		return;
	}
	written = 0;
	since = now_ns();
	step = BATCH * (PAGE * 1000ll) / rate;
	crew_go(&crew);
	say("ok");
}

static void setup(void)
{
	uint64_t random = mix(0);

	pages = (option("--mib", 64) << 20) / PAGE;
	if (pages < 2) {
		errno = EINVAL;
		die("--mib");
	}
	for (mask = 1; mask < pages - 1; shift++)
		mask = mask << 1 | 1;
	shift = shift / 2 + 1;
	data = map_anon(pages * PAGE);
	for (uint64_t i = 0; i < pages; i++)
		write_page(i, &random);
}

/* Shared memory, for what comparing it costs. */
static void setup_shared(void)
{
	size_t bytes = option("--shared-mib", 0) << 20;
	char *at;

	if (!bytes)
		return;
	at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (at == MAP_FAILED)
		die("--shared-mib");
	for (size_t page = 0; page < bytes / PAGE; page++)
		pattern_write(at + page * PAGE, 1, page);
}

static void start(void *(*body)(void *))
{
	pthread_t thread;

	errno = pthread_create(&thread, NULL, body, NULL);
	if (errno)
		die("pthread_create");
}

int main(int argc, char **argv)
{
	static struct text text;
	char line[256];

	target_begin(argc, argv);
	setup();
	setup_shared();
	crew.members = 1;
	start(write_for_ever);
	start(tick_for_ever);
	crew_stop(&crew);
	put(&text, "{\"pid\": %d, \"pages\": %lu}", getpid(), pages);
	say_ready(&text);
	while (target_command(line, sizeof(line))) {
		long number = strchr(line, ' ') ? atol(strchr(line, ' ')) : 0;
		bool whole = number >= 0 && (uint64_t)number <= pages;

		if (!strcmp(line, "gap")) {
			struct gap gap = take_longest();

			say("ok %ld %ld", gap.all, gap.off);
		} else if (!strncmp(line, "write ", 6)) {
			write_at(number);
		} else if (whole && !strncmp(line, "touch ", 6)) {
			say("ok %ld", touch_pages(number));
		} else if (whole && (!strncmp(line, "random ", 7) || !strncmp(line, "run ", 4))) {
			say("ok %ld", write_pages(number, line[1] == 'a'));
		} else {
			say("bad");
		}
	}
	return 0;
}
