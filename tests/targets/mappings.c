/*
 * Tens of thousands of mappings: an area of which every other page cannot be accessed, and of the
 * others every 16th holds its number.
 *
 * Option: --count N (1000). Commands: check.
 */
#include "target.h"

#define EACH 16

volatile unsigned char *area;
volatile long count;

static volatile long *number(long i)
{
	return (volatile long *)(area + i * PAGE);
}

static bool check(void)
{
	for (long i = 0; i < count; i += EACH)
		if (*number(i) != i) {
			fprintf(stderr, "page %ld holds %ld\n", i, *number(i));
			return false;
		}
	return true;
}

int main(int argc, char **argv)
{
	static struct text text;
	char line[256];

	target_begin(argc, argv);
	count = option("--count", 1000);
	area = map_anon(count * PAGE);
	madvise((void *)area, count * PAGE, MADV_NOHUGEPAGE);
	for (long i = 1; i < count; i += 2)
		if (mprotect((void *)number(i), PAGE, PROT_NONE))
			die("mprotect");
	for (long i = 0; i < count; i += EACH)
		*number(i) = i;
	put(&text, "{\"pid\": %d, \"area\": %lu, \"each\": %d}", getpid(), (uint64_t)area, EACH);
	say_ready(&text);
	while (target_command(line, sizeof(line)))
		say("%s", !strcmp(line, "check") && check() ? "ok" : "bad");
	return check() ? 0 : 1;
}
