/*
 * Threads that write random words at random pages of an anonymous mapping and of the heap.
 *
 * Options: --threads T (2), --mib S (16, all threads together), --heap KIB (64, each thread),
 * --rate MB/s (0: as fast as it goes; a write counts as the page it dirties), --fill 1 (write
 * every page first), --running 0 (wait for "go"), --huge 0 (no huge pages), --seed N.
 * Commands: stop, go, stats, check, churn N.
 */
#include "shadow.h"

#define MAX_THREADS 64
#define BATCH 16

struct writer {
	struct area areas[2]; /* a slice of the mapping, a block of the heap */
	struct control *control;
	uint64_t random;
	int64_t step; /* ns a batch, 0: no limit */
};

static struct control controls[MAX_THREADS];
static struct writer writers[MAX_THREADS];
static struct crew crew = CREW;
static struct text text;
static int threads;

static void *write_for_ever(void *arg)
{
	struct writer *me = arg;
	int64_t due = now_ns();

	for (unsigned turn = 0;; turn++) {
		if (!crew.going)
			crew_wait(&crew);
		/* One write in eight goes to the heap. */
		shadow_write(&me->areas[turn % 8 == 0 && me->areas[1].words], me->control,
			     &me->random);
		if (me->step && turn % BATCH == 0)
			pace(&due, me->step);
	}
	return NULL;
}

static void setup(void)
{
	size_t words = (option("--mib", 16) << 20) / sizeof(uint64_t);
	size_t heap_words = (option("--heap", 64) << 10) / sizeof(uint64_t);
	long rate = option("--rate", 0), fill = option("--fill", 0), seed = option("--seed", 1);

	threads = option("--threads", 2);
	if (threads < 1 || threads > MAX_THREADS || words < threads * PAGE_WORDS) {
		errno = EINVAL;
		die("--threads, --mib");
	}
	words = words / threads / PAGE_WORDS * PAGE_WORDS;

	uint64_t *data = map_anon(threads * words * sizeof(uint64_t));
	uint64_t *shadow = map_anon(threads * (words + heap_words) * sizeof(uint64_t));

	if (!option("--huge", 1))
		madvise(data, threads * words * sizeof(uint64_t), MADV_NOHUGEPAGE);
	for (int i = 0; i < threads; i++) {
		struct writer *w = &writers[i];

		w->areas[0] = (struct area){ data + i * words, shadow + i * words, words };
		w->areas[1] =
			(struct area){ calloc(heap_words + 1, sizeof(uint64_t)),
				       shadow + threads * words + i * heap_words, heap_words };
		w->control = &controls[i];
		w->random = mix(seed * MAX_THREADS + i) | 1;
		w->step = rate ? BATCH * (PAGE * 1000000000ll * threads) / (rate * 1000000ll) : 0;
		if (fill)
			shadow_fill(&w->areas[0], seed + i);
	}
}

static void start(void)
{
	pthread_t thread;

	crew.members = threads;
	for (int i = 0; i < threads; i++) {
		errno = pthread_create(&thread, NULL, write_for_ever, &writers[i]);
		if (errno)
			die("pthread_create");
	}
	crew_stop(&crew);
	if (option("--running", 1))
		crew_go(&crew);
}

static void report_ready(void)
{
	put(&text, "{\"pid\": %d, \"areas\": [", getpid());
	for (int i = 0; i < 2 * threads; i++) {
		put(&text, i ? ", " : "");
		put_area(&text, &writers[i / 2].areas[i % 2]);
	}
	put(&text, "], \"control\": [");
	for (int i = 0; i < threads; i++)
		put(&text, "%s%lu", i ? ", " : "", (uint64_t)&controls[i]);
	put(&text, "]}");
	say_ready(&text);
}

static bool agrees(void)
{
	for (int i = 0; i < 2 * threads; i++)
		if (!shadow_agrees(&writers[i / 2].areas[i % 2]))
			return false;
	return true;
}

static bool check(void)
{
	bool was_going = crew_stop(&crew);
	bool good = agrees();

	if (was_going)
		crew_go(&crew);
	return good;
}

/* Blocks come and go; the newest few stay, so that the map differs from one epoch to the next. */
static void churn(long blocks)
{
	static struct block {
		char *at;
		size_t mapped;
	} live[32];
	static uint64_t random = 42;

	for (long i = 0; i < blocks; i++) {
		struct block *slot = &live[i % 32];
		size_t size = 1 + next_random(&random) % (64 * PAGE);

		if (slot->mapped)
			munmap(slot->at, slot->mapped);
		else
			free(slot->at);
		slot->mapped = i % 2 ? (size + PAGE - 1) / PAGE * PAGE : 0;
		slot->at = slot->mapped ? map_anon(slot->mapped) : malloc(size);
		memset(slot->at, (int)i, size);
	}
}

static void stats(void)
{
	uint64_t writes = 0;

	for (int i = 0; i < threads; i++)
		writes += controls[i].writes;
	say("{\"writes\": %lu, \"running\": %s}", writes, crew.going ? "true" : "false");
}

int main(int argc, char **argv)
{
	char line[256];

	target_begin(argc, argv);
	setup();
	start();
	report_ready();
	while (target_command(line, sizeof(line))) {
		if (!strcmp(line, "stats")) {
			stats();
			continue;
		}
		bool good = true;
		if (!strcmp(line, "stop"))
			crew_stop(&crew);
		else if (!strcmp(line, "go"))
			crew_go(&crew);
		else if (!strcmp(line, "check"))
			good = check();
		else if (!strncmp(line, "churn ", 6))
			churn(atol(line + 6));
		else
			good = false;
		say("%s", good ? "ok" : "bad");
	}
	crew_stop(&crew);
	return agrees() ? 0 : 1;
}
