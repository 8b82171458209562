/*
 * A program that fills memory on demand by a userfaultfd of its own, as migration tools do. One
 * thread writes page after page and discards them all again, another answers its page faults.
 * Every fault should come from a write: one that reads is somebody else's.
 *
 * Options: --pages N (512), --async 1: write protection of its own (WP_ASYNC) instead, and no
 * thread at all. Commands: check, stats.
 */
#include "target.h"

#include <linux/userfaultfd.h>
#include <sys/ioctl.h>

#ifndef UFFD_FEATURE_WP_ASYNC /* Linux 6.7 */
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif
#define UNPOPULATED (1 << 13)

static int uffd;
static uint8_t *area;
static size_t bytes;
static uint8_t source[PAGE] __attribute__((aligned(4096)));
static volatile uint64_t answered, strange, rounds;

static void open_userfaultfd(uint64_t features, uint64_t mode)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };
	struct uffdio_register range = { .mode = mode };

	range.range.start = (uint64_t)area;
	range.range.len = bytes;
	uffd = syscall(SYS_userfaultfd, O_CLOEXEC);
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &range))
		die("userfaultfd");
}

static void *answer(void *unused)
{
	struct uffd_msg msg;

	(void)unused;
	while (read(uffd, &msg, sizeof(msg)) == sizeof(msg)) {
		struct uffdio_copy copy = { .src = (uint64_t)source, .len = PAGE };

		copy.dst = msg.arg.pagefault.address & -PAGE;
		strange += !(msg.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WRITE);
		if (ioctl(uffd, UFFDIO_COPY, &copy) && errno != EEXIST)
			die("UFFDIO_COPY");
		answered++;
	}
	die("read");
	return NULL;
}

static void *write_and_discard(void *unused)
{
	(void)unused;
	for (;; rounds++) {
		for (size_t at = 0; at < bytes; at += PAGE)
			pattern_write(area + at, rounds + 1, at / PAGE);
		if (madvise(area, bytes, MADV_DONTNEED))
			die("madvise");
	}
	return NULL;
}

static void start(void *(*run)(void *))
{
	pthread_t thread;

	errno = pthread_create(&thread, NULL, run, NULL);
	if (errno)
		die("pthread_create");
}

int main(int argc, char **argv)
{
	static struct text text;
	char line[256];

	target_begin(argc, argv);
	bytes = option("--pages", 512) * PAGE;
	area = map_anon(bytes);
	if (option("--async", 0)) {
		open_userfaultfd(UFFD_FEATURE_WP_ASYNC | UNPOPULATED, UFFDIO_REGISTER_MODE_WP);
		memset(area, 1, bytes);
	} else {
		open_userfaultfd(0, UFFDIO_REGISTER_MODE_MISSING);
		start(answer);
		start(write_and_discard);
	}
	put(&text, "{\"pid\": %d, \"area\": {\"addr\": %lu, \"bytes\": %lu}}", getpid(),
	    (uint64_t)area, bytes);
	say_ready(&text);
	while (target_command(line, sizeof(line)))
		if (!strcmp(line, "stats"))
			say("{\"answered\": %lu, \"strange\": %lu, \"rounds\": %lu}", answered,
			    strange, rounds);
		else
			say("%s", !strcmp(line, "check") && !strange ? "ok" : "bad");
	if (strange)
		fprintf(stderr, "%lu page faults were no writes\n", strange);
	return strange ? 1 : 0;
}
