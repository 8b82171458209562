/*
 * Memory written at random, with a shadow copy that says what must be there.
 *
 * Each writer thread announces a write in its `struct control`, then stores to the shadow, then to
 * the data. So whenever a thread is stopped, its data and shadow agree everywhere but at the one
 * word that `at` names: any consistent image of the process can be judged, not only a quiet one.
 */
#ifndef SHADOW_H
#define SHADOW_H

#include "target.h"

/* Read by the harness: three words at the address that "ready" reports for each thread. */
struct control {
	volatile uint64_t writes; /* finished writes */
	volatile uint64_t at;	  /* address of the data word being written, or written last */
	volatile uint64_t value;  /* what goes there: the low 40 bits number the write */
} __attribute__((aligned(64)));

struct area {
	volatile uint64_t *data, *shadow;
	size_t words;
};

static inline uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static inline void shadow_write(const struct area *area, struct control *control, uint64_t *random)
{
	uint64_t draw = next_random(random);
	size_t i = draw % area->words;
	uint64_t number = control->writes + 1;
	uint64_t value = (draw & ~0ull << 40) | (number & ~(~0ull << 40));

	control->value = value;
	control->at = (uint64_t)&area->data[i];
	area->shadow[i] = value;
	area->data[i] = value;
	control->writes = number;
}

static inline void shadow_fill(const struct area *area, uint64_t seed)
{
	for (size_t i = 0; i < area->words; i++)
		area->shadow[i] = area->data[i] =
			pattern_word(seed, i / PAGE_WORDS, i % PAGE_WORDS);
}

/* Only while the writer is parked. */
static inline bool shadow_agrees(const struct area *area)
{
	for (size_t i = 0; i < area->words; i++)
		if (area->data[i] != area->shadow[i]) {
			fprintf(stderr, "at %p: %#lx, shadow at %p: %#lx\n", (void *)&area->data[i],
				area->data[i], (void *)&area->shadow[i], area->shadow[i]);
			return false;
		}
	return true;
}

static inline void put_area(struct text *text, const struct area *area)
{
	put(text, "{\"data\": %lu, \"shadow\": %lu, \"bytes\": %zu}", (uint64_t)area->data,
	    (uint64_t)area->shadow, area->words * sizeof(uint64_t));
}

/* Threads that can be parked together and let go again. */
struct crew {
	pthread_mutex_t lock;
	pthread_cond_t change;
	volatile bool going;
	int members, parked;
};

#define CREW { .lock = PTHREAD_MUTEX_INITIALIZER, .change = PTHREAD_COND_INITIALIZER }

/* Called by a member between two writes. */
static inline void crew_wait(struct crew *crew)
{
	pthread_mutex_lock(&crew->lock);
	crew->parked++;
	pthread_cond_broadcast(&crew->change);
	while (!crew->going)
		pthread_cond_wait(&crew->change, &crew->lock);
	crew->parked--;
	pthread_mutex_unlock(&crew->lock);
}

/* Returns whether the crew was going, once every member is parked. */
static inline bool crew_stop(struct crew *crew)
{
	pthread_mutex_lock(&crew->lock);
	bool was = crew->going;
	crew->going = false;
	while (crew->parked < crew->members)
		pthread_cond_wait(&crew->change, &crew->lock);
	pthread_mutex_unlock(&crew->lock);
	return was;
}

static inline void crew_go(struct crew *crew)
{
	pthread_mutex_lock(&crew->lock);
	crew->going = true;
	pthread_cond_broadcast(&crew->change);
	pthread_mutex_unlock(&crew->lock);
}

static inline int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ll + now.tv_nsec;
}

/*
 * Sleep until the next batch is due, `step` ns after the last. After a long stop the time lost is
 * not made up for, else every pause would be followed by a burst.
 */
static inline void pace(int64_t *due, int64_t step)
{
	int64_t now = now_ns();

	*due += step;
	if (*due < now - 50000000)
		*due = now;
	if (*due > now) {
		struct timespec until = { *due / 1000000000, *due % 1000000000 };

		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
	}
}

#endif
