/*
 * Run a program on a kernel that has no userfaultfd, or no PAGEMAP_SCAN either: the calls fail as
 * they do where they were never implemented.
 *
 *     without userfaultfd|pagemap_scan PROGRAM [ARGUMENT]...
 */
#include "target.h"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>

#define PAGEMAP_SCAN 0xc0606610u
#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define EQUAL(value, yes, no) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, yes, no)
#define FAIL(error) BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (error))

int main(int argc, char **argv)
{
	struct sock_filter filter[] = {
		LOAD(nr),
		EQUAL(SYS_userfaultfd, 0, 1),
		FAIL(ENOSYS),
		EQUAL(SYS_ioctl, 0, 3),
		LOAD(args[1]),
		EQUAL(PAGEMAP_SCAN, 0, 1),
		FAIL(ENOTTY),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { sizeof(filter) / sizeof(filter[0]), filter };

	if (argc < 3)
		return 2;
	if (!strcmp(argv[1], "userfaultfd")) /* PAGEMAP_SCAN stays */
		filter[5] = (struct sock_filter)EQUAL(0, 0, 1);
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
	    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0))
		die("seccomp");
	execvp(argv[2], argv + 2);
	die(argv[2]);
}
