/*
 * Somebody else in a process's memory, once:
 *
 *     outsider writev|poke|mem|look|page_out PID ADDRESS PAGES BYTE
 *
 * The first three fill the pages with the byte: by process_vm_writev, by ptrace, by /proc/PID/mem.
 * "look" only reads about them, and "page_out" has the kernel write them to swap.
 */
#include "target.h"

#include <sys/ptrace.h>
#include <sys/uio.h>

static bool poke(pid_t pid, char *to, const char *words, size_t bytes)
{
	bool good = true;

	if (ptrace(PTRACE_SEIZE, pid, 0, 0) || ptrace(PTRACE_INTERRUPT, pid, 0, 0) ||
	    waitpid(pid, NULL, __WALL) != pid)
		return false;
	for (size_t at = 0; good && at < bytes; at += sizeof(long))
		good = !ptrace(PTRACE_POKEDATA, pid, to + at, *(const long *)(words + at));
	return !ptrace(PTRACE_DETACH, pid, 0, 0) && good;
}

static int open_of(pid_t pid, const char *name, int how)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/%s", pid, name);
	return open(path, how | O_CLOEXEC);
}

static bool look(pid_t pid)
{
	static char text[1 << 16];
	int fd = open_of(pid, "smaps", O_RDONLY);
	ssize_t got;

	while ((got = read(fd, text, sizeof(text))) > 0)
		;
	return got == 0;
}

static bool page_out(pid_t pid, struct iovec pages)
{
	int fd = syscall(SYS_pidfd_open, pid, 0);

	return syscall(SYS_process_madvise, fd, &pages, 1, MADV_PAGEOUT, 0) >= 0;
}

int main(int argc, char **argv)
{
	static char words[64 * PAGE];

	if (argc != 6)
		die("usage");

	pid_t pid = atoi(argv[2]);
	char *to = (char *)strtoul(argv[3], NULL, 0);
	ssize_t bytes = atol(argv[4]) * PAGE;
	struct iovec from = { words, bytes }, into = { to, bytes };

	if ((size_t)bytes > sizeof(words))
		die("pages");
	memset(words, atoi(argv[5]), bytes);
	if (!strcmp(argv[1], "writev"))
		return process_vm_writev(pid, &from, 1, &into, 1, 0) != bytes;
	if (!strcmp(argv[1], "poke"))
		return !poke(pid, to, words, bytes);
	if (!strcmp(argv[1], "mem"))
		return pwrite(open_of(pid, "mem", O_RDWR), words, bytes, (off_t)to) != bytes;
	if (!strcmp(argv[1], "look"))
		return !look(pid);
	return strcmp(argv[1], "page_out") || !page_out(pid, into);
}
