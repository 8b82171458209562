/*
 * Run a program on a kernel that lacks something, or in a container that forbids it: the calls fail
 * as they do there. Without userfaultfd there may be PAGEMAP_SCAN, but not the other way round.
 *
 *     without userfaultfd|pagemap_scan|ptrace|process_vm_readv|bpf PROGRAM [ARGUMENT]...
 */
#include "target.h"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>

#define PAGEMAP_SCAN 0xc0606610u
#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define EQUAL(value, yes, no) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, yes, no)
#define FAIL(error) BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (error))
#define NO_SCAN 0 /* no command of ioctl is that */

static const struct {
	const char *name;
	unsigned int call, error, scan;
} features[] = {
	{ "userfaultfd", SYS_userfaultfd, ENOSYS, NO_SCAN },
	{ "pagemap_scan", SYS_userfaultfd, ENOSYS, PAGEMAP_SCAN },
	{ "ptrace", SYS_ptrace, EPERM, NO_SCAN },
	{ "process_vm_readv", SYS_process_vm_readv, EPERM, NO_SCAN },
	{ "bpf", SYS_bpf, EPERM, NO_SCAN },
};

static void forbid(unsigned int call, unsigned int error, unsigned int scan)
{
	struct sock_filter filter[] = {
		LOAD(nr),
		EQUAL(call, 0, 1),
		FAIL(error),
		EQUAL(SYS_ioctl, 0, 3),
		LOAD(args[1]),
		EQUAL(scan, 0, 1),
		FAIL(ENOTTY),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { sizeof(filter) / sizeof(filter[0]), filter };

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
	    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0))
		die("seccomp");
}

int main(int argc, char **argv)
{
	if (argc < 3)
		return 2;
	for (size_t i = 0; i < sizeof(features) / sizeof(features[0]); i++) {
		if (strcmp(argv[1], features[i].name))
			continue;
		forbid(features[i].call, features[i].error, features[i].scan);
		execvp(argv[2], argv + 2);
		die(argv[2]);
	}
	return 2;
}
