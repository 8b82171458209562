// SPDX-License-Identifier: GPL-2.0
/*
 * Mark the pages that the targets write.
 *
 * After the controller has armed a page, its next write faults, and the page-fault tracepoints see
 * that. Only tracepoint arguments and helpers are used, no kernel struct, so headers of any
 * version will do. Given by the loader: REGIONS, TARGETS and RING_PAGES,
 * the sizes of the maps.
 */
#include "track.h"

BPF_TABLE("hash", struct region_key, struct region_bits, written0, REGIONS);
BPF_TABLE("hash", struct region_key, struct region_bits, written1, REGIONS);
BPF_TABLE("hash", u32, struct target, targets, TARGETS);
/* Which of the two maps takes marks now: the controller switches while all targets are stopped,
 * and drains the other one after they run again. */
BPF_ARRAY(generation, u32, 1);
BPF_ARRAY(totals, u64, TOTAL_COUNT);
/* The question put to resolve(): device and inode of a PID namespace, a process number in it; and
 * its answer, that process's number in the initial namespace. */
BPF_ARRAY(question, u64, 4);
BPF_ARRAY(controller, u64, CONTROLLER_COUNT);
/* Address spaces under watch, by mm_struct: times that somebody let go of their lock. */
BPF_TABLE("hash", u64, u64, visits, TARGETS);
/* The thread whose kernel-mode page fault a processor handles. */
BPF_PERCPU_ARRAY(faulting, u64, 1);
/* Each region when it is first marked in a generation, as struct region_key. */
BPF_RINGBUF_OUTPUT(fresh, RING_PAGES);

static __always_inline void count(int index)
{
	u64 *total = totals.lookup(&index);

	if (total)
		__sync_fetch_and_add(total, 1);
}

static __always_inline struct region_bits *find_region(struct region_key *key)
{
	int zero = 0;
	u32 *second = generation.lookup(&zero);

	if (second && *second)
		return written1.lookup(key);
	return written0.lookup(key);
}

static __always_inline void add_region(struct region_key *key)
{
	struct region_bits empty = {};
	int zero = 0;
	u32 *second = generation.lookup(&zero);

	/* Never over an element that another CPU has just added. */
	if (second && *second)
		written1.insert(key, &empty);
	else
		written0.insert(key, &empty);
	if (fresh.ringbuf_output(key, sizeof(*key), BPF_RB_NO_WAKEUP))
		count(TOTAL_UNTOLD);
}

static __always_inline int mark_written(u64 address)
{
	u32 tgid = bpf_get_current_pid_tgid() >> 32;
	struct target *target = targets.lookup(&tgid);

	if (!target)
		return 0;
	__sync_fetch_and_add(&target->faults, 1);

	struct region_key key = { .tgid = tgid, .region = address >> REGION_SHIFT };
	struct region_bits *bits = find_region(&key);

	if (!bits) {
		add_region(&key);
		bits = find_region(&key);
		if (!bits) {
			__sync_fetch_and_add(&target->lost, 1);
			return 0;
		}
	}

	u64 page = address >> PAGE_SHIFT_4K;
	u64 bit = 1ULL << (page & 63);
	u64 *word = &bits->word[(page >> 6) & (REGION_WORDS - 1)];

	if (!(*word & bit))
		__sync_fetch_and_or(word, bit);
	return 0;
}

#define FAULT_WRITE 2 /* bit of the x86 page-fault error code */

RAW_TRACEPOINT_PROBE(page_fault_user)
{
	return ctx->args[2] & FAULT_WRITE ? mark_written(ctx->args[0]) : 0;
}

RAW_TRACEPOINT_PROBE(page_fault_kernel)
{
	int zero = 0;
	u64 *thread = faulting.lookup(&zero);

	if (thread)
		*thread = bpf_get_current_pid_tgid();
	return ctx->args[2] & FAULT_WRITE ? mark_written(ctx->args[0]) : 0;
}

/*
 * Every change of the address space takes its lock for writing: system calls, stack growth, and
 * what io_uring does on the target's behalf. Far rarer than system calls, and nothing is missed.
 */
RAW_TRACEPOINT_PROBE(mmap_lock_acquire_returned)
{
	if (!ctx->args[1])
		return 0;

	u32 tgid = bpf_get_current_pid_tgid() >> 32;
	struct target *target = targets.lookup(&tgid);

	if (target)
		__sync_fetch_and_add(&target->map_changes, 1);
	return 0;
}

/*
 * Who lets go of the lock may have changed memory without a page fault: pages that the kernel wrote
 * to for somebody, or discarded. Counted at the end, so that what was begun earlier counts, too. A
 * fault in kernel mode takes the lock itself and is no reason to count: it is marked. Where that
 * cannot be told for sure, it counts.
 */
RAW_TRACEPOINT_PROBE(mmap_lock_released)
{
	u64 space = ctx->args[0], who = bpf_get_current_pid_tgid();
	u32 process = who >> 32;
	int zero = 0, tgid = CONTROLLER_TGID, own = CONTROLLER_SPACE, visited = CONTROLLER_VISITED;
	u64 *value = controller.lookup(&tgid);

	if (value && *value == process) {
		value = controller.lookup(&own);
		if (value && *value != space)
			controller.update(&visited, &space);
		return 0;
	}

	u64 *counted = visits.lookup(&space);

	if (!counted)
		return 0;
	value = faulting.lookup(&zero);
	if (value && *value == who && targets.lookup(&process))
		*value = 0;
	else
		__sync_fetch_and_add(counted, 1);
	return 0;
}

/* Reasons of enum tlb_flush_reason that are the current task's own; the others are a processor's
 * answer to somebody else. */
#define TLB_LOCAL_SHOOTDOWN 2
#define TLB_REMOTE_SEND_IPI 4

/* The beginning of what user mode had in its registers, as ptrace has it, too (asm/ptrace.h). */
struct user_registers {
	u64 others[15];
	s64 orig_ax; /* number of the system call; negative after an exception */
};

/*
 * Pages can be discarded under the lock of their VMA alone; but the TLB has to be flushed. A page
 * fault that replaces its page flushes, too, and is marked: the thread did not come by a system
 * call then. Not loaded where the kernel does not show a task's registers (before Linux 5.15).
 */
int flushed(struct bpf_raw_tracepoint_args *ctx)
{
	int reason = ctx->args[0];

	if (reason < TLB_LOCAL_SHOOTDOWN || reason > TLB_REMOTE_SEND_IPI)
		return 0;

	u32 tgid = bpf_get_current_pid_tgid() >> 32;
	struct target *target = targets.lookup(&tgid);

	if (!target)
		return 0;

	struct user_registers *user = (void *)bpf_task_pt_regs(bpf_get_current_task_btf());

	if (ctx->args[1] != 1 || user->orig_ax >= 0)
		__sync_fetch_and_add(&target->flushes, 1);
	return 0;
}

/* Reclaim drops pages that were given up with MADV_FREE, and takes no lock for it. */
RAW_TRACEPOINT_PROBE(mm_vmscan_lru_shrink_inactive)
{
	count(TOTAL_RECLAIMS);
	return 0;
}

#define CLONE_VM 0x100
#define CLONE_THREAD 0x10000

/*
 * Runs in the parent before the child first runs, so none of the child's faults comes too early.
 * A child in the same address space is always followed: what it writes is the target's memory.
 */
TRACEPOINT_PROBE(task, task_newtask)
{
	u32 tgid = bpf_get_current_pid_tgid() >> 32;
	struct target *parent = targets.lookup(&tgid);

	if (!parent)
		return 0;
	if (args->clone_flags & CLONE_THREAD) {
		if (parent->flags & TARGET_CHILD)
			__sync_fetch_and_add(&parent->threads, 1);
		return 0;
	}
	if (!(parent->flags & TARGET_FOLLOW) && !(args->clone_flags & CLONE_VM))
		return 0;

	u32 child = args->pid;
	struct target added = { .threads = 1, .flags = TARGET_CHILD };

	added.flags |= parent->flags & TARGET_FOLLOW;
	if (args->clone_flags & CLONE_VM)
		added.flags |= TARGET_SHARES;

	if (targets.update(&child, &added))
		count(TOTAL_LOST_CHILDREN);
	return 0;
}

TRACEPOINT_PROBE(sched, sched_process_exec)
{
	u32 tgid = bpf_get_current_pid_tgid() >> 32;
	struct target *target = targets.lookup(&tgid);

	if (!target || !(target->flags & TARGET_SHARES))
		return 0;
	target->flags &= ~TARGET_SHARES;
	if (!(target->flags & TARGET_FOLLOW))
		targets.delete(&tgid);
	return 0;
}

TRACEPOINT_PROBE(sched, sched_process_exit)
{
	u32 tgid = bpf_get_current_pid_tgid() >> 32;
	struct target *target = targets.lookup(&tgid);

	if (!target || !(target->flags & TARGET_CHILD))
		return 0;
	/* The sum is read apart: not every BPF target gives an addition's result. What the child
	 * wrote stays in the map until it is drained. */
	__sync_fetch_and_add(&target->threads, -1);
	if (!target->threads)
		targets.delete(&tgid);
	return 0;
}

/*
 * Attached only while the controller looks for a target's number in the initial namespace: the
 * target, being stopped, leaves the CPU, and so passes here.
 */
int resolve(struct bpf_raw_tracepoint_args *ctx)
{
	int first = 0, second = 1, third = 2, fourth = 3;
	u64 *dev = question.lookup(&first);
	u64 *ino = question.lookup(&second);
	u64 *number = question.lookup(&third);
	u64 *answer = question.lookup(&fourth);
	struct bpf_pidns_info info = {};

	if (!dev || !ino || !number || !answer)
		return 0;
	if (!bpf_get_ns_current_pid_tgid(*dev, *ino, &info, sizeof(info)) && info.tgid == *number)
		*answer = bpf_get_current_pid_tgid() >> 32;
	return 0;
}
