/*
 * One place of memory whose pages change what they are: private, a file's, moved away and back.
 *
 * Option: --file PATH (four pages at least). Every command is answered by the byte that the first
 * page then begins with, as a number:
 *   anon       private memory, its pages begin with 'a'
 *   lay        the file is mapped privately over it, and read
 *   copy       the same, and the pages are written: they begin with 'z'
 *   discard    MADV_DONTNEED, and read
 *   away back  mremap() to another place; and back, where it can merge with what stayed
 *   return     back, and side before anybody can look
 *   poke       write the next number to the first page
 *   side       write the next number to a page that was never moved
 *   look       nothing
 */
#include "target.h"

#define PAGES 8
#define PLACE ((char *)0x200000000)
#define ELSEWHERE ((char *)0x300000000)

static char *at = PLACE + 4 * PAGE;
static int file;

static void map_over(char *place, size_t pages, int fd)
{
	int flags = MAP_PRIVATE | MAP_FIXED | (fd < 0 ? MAP_ANONYMOUS : 0);

	if (mmap(place, pages * PAGE, PROT_READ | PROT_WRITE, flags, fd, 0) == MAP_FAILED)
		die("mmap");
}

static void fill(char *place, size_t pages, char with)
{
	for (size_t i = 0; i < pages; i++)
		memset(place + i * PAGE, with, 64);
}

static void move(char *to)
{
	if (mremap(at, 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == MAP_FAILED)
		die("mremap");
	at = to;
}

static bool obey(const char *line)
{
	static char next = 'A';

	if (!strcmp(line, "anon")) {
		map_over(PLACE, PAGES, -1);
		fill(PLACE, PAGES, 'a');
	} else if (!strcmp(line, "lay") || !strcmp(line, "copy")) {
		map_over(at, 4, file);
		if (line[0] == 'c')
			fill(at, 4, 'z');
	} else if (!strcmp(line, "discard")) {
		if (madvise(at, 4 * PAGE, MADV_DONTNEED))
			die("madvise");
	} else if (!strcmp(line, "away")) {
		move(ELSEWHERE);
	} else if (!strcmp(line, "back")) {
		move(PLACE + 4 * PAGE);
	} else if (!strcmp(line, "return")) {
		move(PLACE + 4 * PAGE);
		fill(PLACE, 1, next++);
	} else if (!strcmp(line, "poke")) {
		fill(at, 1, next++);
	} else if (!strcmp(line, "side")) {
		fill(PLACE, 1, next++);
	} else if (strcmp(line, "look")) {
		return false;
	}
	return true;
}

int main(int argc, char **argv)
{
	static struct text text;
	char line[64];

	target_begin(argc, argv);
	file = open(option_text("--file", "/dev/null"), O_RDONLY | O_CLOEXEC);
	if (file < 0)
		die("--file");
	obey("anon");
	put(&text, "{\"pid\": %d}", getpid());
	say_ready(&text);
	while (target_command(line, sizeof(line))) {
		if (obey(line))
			say("{\"at\": %lu, \"byte\": %d}", (uint64_t)at, *(volatile char *)at);
		else
			say("bad");
	}
	return 0;
}
