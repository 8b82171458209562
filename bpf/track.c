// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Mark the pages that the targets write.
 *
 * After the controller has armed a page, its next write faults, and the page-fault tracepoints see
 * that. No struct is taken from the kernel's headers but pt_regs, which is ABI, so those of any
 * version will do. Given by the loader: REGIONS, TARGETS and RING_PAGES, the sizes of the maps;
 * OLD_KERNEL before Linux 5.12; and from the running kernel's BTF, where it has that, VMA_MM_OFFSET
 * (of vm_mm in struct vm_area_struct) and LOCK_WRITE_ARG (which argument of the tracepoints of the
 * mmap lock tells that it is held for writing).
 */
#include <uapi/linux/ptrace.h>

#include "track.h"

#ifdef OLD_KERNEL
/* It has no atomic "or", so another CPU's mark may get lost. Nothing goes by the marks there. */
static __always_inline u64 set_bits(u64 *word, u64 bits)
{
	u64 before = *word;

	*word |= bits;
	return before;
}
#else
#define set_bits __sync_fetch_and_or
#endif

#ifndef LOCK_WRITE_ARG
#define LOCK_WRITE_ARG 1
#endif

BPF_TABLE("hash", struct region_key, struct region_bits, written0, REGIONS);
BPF_TABLE("hash", struct region_key, struct region_bits, written1, REGIONS);
BPF_TABLE("hash", u32, struct target, targets, TARGETS);
/* Which of the two maps takes marks now: the controller switches, and drains the other one. */
BPF_ARRAY(generation, u32, 1);
BPF_ARRAY(totals, u64, TOTAL_COUNT);
/* The question put to resolve(): device and inode of a PID namespace, a process number in it; and
 * its answer, that process's number in the initial namespace. */
BPF_ARRAY(question, u64, 4);
BPF_ARRAY(controller, u64, CONTROLLER_COUNT);
/* Address spaces under watch, by the address of their mm_struct. */
BPF_TABLE("hash", u64, struct visits, visits, TARGETS);
/* Which address space a target runs in, as far as the controller knows. */
BPF_TABLE("hash", u32, u64, homes, TARGETS);
/* Threads of targets in a fault in kernel mode, which takes the lock next: whether it writes. */
BPF_TABLE("lru_hash", u64, u32, faulting, 1024);
/* Threads in a plain visit, and the address space that they are in. */
BPF_TABLE("hash", u64, u64, plain, TARGETS);
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

enum marked { NO_ROOM, NEWLY, AGAIN };

static __always_inline enum marked mark_under(u32 number, u64 address)
{
	struct region_key key = { .number = number, .region = address >> REGION_SHIFT };
	struct region_bits *bits = find_region(&key);

	/* Once more where the generation has changed between the two steps. */
	for (int tries = 0; !bits && tries < 2; tries++) {
		add_region(&key);
		bits = find_region(&key);
	}
	if (!bits)
		return NO_ROOM;

	u64 page = address >> PAGE_SHIFT_4K;
	u64 bit = 1ULL << (page & 63);
	u64 *word = &bits->word[(page >> 6) & (REGION_WORDS - 1)];

	return *word & bit || set_bits(word, bit) & bit ? AGAIN : NEWLY;
}

/* Whether there was room for the mark. A page that is found written tells of one fault only: of
 * others, the write may still be to come. So they have marks of their own. */
static __always_inline bool mark(u32 number, u64 address)
{
	enum marked first = mark_under(number, address);

	return first == AGAIN ? mark_under(number | MARKED_AGAIN, address) != NO_ROOM : first == NEWLY;
}

/* Whether it is a target that writes. */
static __always_inline int mark_written(u64 address)
{
	u32 tgid = bpf_get_current_pid_tgid() >> 32;
	struct target *target = targets.lookup(&tgid);

	if (!target)
		return 0;
	if (!mark(tgid, address))
		__sync_fetch_and_add(&target->lost, 1);
	/* Last, so that whoever has read it can read the mark. */
	__sync_fetch_and_add(&target->faults, 1);
	return 1;
}

/* Of the x86 page-fault error code. The kernel takes every access to a shadow stack for a write. */
#define FAULT_WRITE 2
#define FAULT_SHADOW_STACK 0x40
#define WRITES (FAULT_WRITE | FAULT_SHADOW_STACK)

RAW_TRACEPOINT_PROBE(page_fault_user)
{
	if (ctx->args[2] & WRITES)
		mark_written(ctx->args[0]);
	return 0;
}

RAW_TRACEPOINT_PROBE(page_fault_kernel)
{
	u64 who = bpf_get_current_pid_tgid();
	u32 tgid = who >> 32, writes = (ctx->args[2] & WRITES) != 0;

	if (writes ? mark_written(ctx->args[0]) : targets.lookup(&tgid) != NULL)
		faulting.update(&who, &writes);
	return 0;
}

/* A part of struct pt_regs, as a system call leaves it. */
struct user_state {
	u64 second, first, call, ip, cs;
};

#define EXCEPTION (-1ULL)
#define NO_CALL (-2ULL) /* or nobody knows */

#ifdef VMA_MM_OFFSET
#define FAULT_FLAG_WRITE 1

/*
 * At handle_mm_fault(vma, address, flags, regs). Everybody who writes to memory that is armed passes
 * here: exceptions, and whoever asks for its pages, be they another process's or for a device.
 * Exceptions come with the registers, and those of targets are marked above. The rest is marked
 * here, perhaps once more than needed. struct pt_regs is part of x86-64's ABI.
 */
int fault_of_anybody(struct pt_regs *ctx)
{
	u32 tgid = bpf_get_current_pid_tgid() >> 32;
	u64 vma = PT_REGS_PARM1(ctx), space = 0;

	if (!(PT_REGS_PARM3(ctx) & FAULT_FLAG_WRITE))
		return 0;
	if (PT_REGS_PARM4(ctx) && targets.lookup(&tgid))
		return 0;
	if (bpf_probe_read_kernel(&space, sizeof(space), (void *)(vma + VMA_MM_OFFSET))) {
		count(TOTAL_UNTOLD);
		return 0;
	}

	struct visits *visited = visits.lookup(&space);

	if (!visited)
		return 0;
	__sync_fetch_and_add(&visited->written, 1);
	if (!mark(visited->number, PT_REGS_PARM2(ctx)))
		count(TOTAL_UNTOLD);
	return 0;
}

#define SI 104 /* where that begins */
#define USER_CS 0x33

/* The system call that the current thread is in, with its arguments in `user`; EXCEPTION where an
 * exception of 64-bit code brought it into the kernel. Numbers of 32-bit calls that look like one of
 * those below do nothing of what is said there. */
static __always_inline u64 current_call(struct user_state *user)
{
	void *regs = (void *)bpf_task_pt_regs((void *)bpf_get_current_task_btf());

	if (bpf_probe_read_kernel(user, sizeof(*user), regs + SI))
		return NO_CALL;
	/* The kernel's own threads have only zeros there, workers that it gives a process no ip. */
	if (!user->ip || (user->cs & 0xffff) != USER_CS)
		return NO_CALL;
	return user->call;
}

/* Whether the current thread may move memory together with its page tables, each of which is for an
 * aligned region: by mremap(address, size), if that reaches the end of one. */
static __always_inline bool moves_tables(u64 call, struct user_state *user)
{
	u64 inside = user->first & ((1 << REGION_SHIFT) - 1);
	u64 size = user->second + (1 << PAGE_SHIFT_4K) - 1;

	if (call == 163 || call == (25 | 1 << 30)) /* as 32-bit code and x32 call it */
		return true;
	return call == 25 && (inside + size) >> REGION_SHIFT;
}

/* Whether a call of the current thread's that changes the address space can make a mapping. */
static __always_inline bool maps(u64 call)
{
	return call == 9 || call == 12 || call == 25 /* mmap, brk, mremap */ || call == 206 /* io_setup */;
}

/* Whether it makes no mapping, and cannot join two that are there. */
static __always_inline bool joins_nothing(u64 call)
{
	return call == EXCEPTION || call == NO_CALL || call == 11 /* munmap */ || call == 56 || call == 57 ||
	       call == 58 || call == 435 /* clone and its kin */;
}

/*
 * Whether the current thread is in a call that can write to memory through the kernel's own mapping
 * of its pages: it asks for the pages first, and the data come later, when they may be armed again.
 */
static __always_inline bool writes_behind(u64 call)
{
	return call == 1 || call == 18 || call == 20 /* write, pwrite64, writev: /proc/PID/mem */ ||
	       call == 296 || call == 328 /* pwritev, pwritev2 */ || call == 311 /* process_vm_writev */;
}

/*
 * Whether the current thread is in read, write or one of their kin, process_vm_readv or _writev, or
 * ptrace. Whatever these do with anybody's memory while they hold its lock for reading, files of
 * /proc and of the kernel's settings included, they do by page faults: nothing discards or
 * replaces contents there.
 */
static __always_inline bool only_faults(u64 call)
{
	return writes_behind(call) || call == 0 /* read */ || call == 17 || call == 19 /* pread64, readv */ ||
	       call == 101 /* ptrace */ || call == 295 || call == 327 /* preadv, preadv2 */ ||
	       call == 310 /* process_vm_readv */;
}

/* Whether this visit, for reading, is plain. The controller compares what it reads of `begun` with
 * what it reads of `plain` after that, so they are changed in the other order. */
static __always_inline bool is_plain(struct visits *counted, u64 who, u64 space, u64 call, bool over)
{
	int index = CONTROLLER_COVERS;
	u64 *where = plain.lookup(&who), *covers;
	bool known = where && *where == space;

	if (known)
		plain.delete(&who);
	if (over) {
		if (known)
			__sync_fetch_and_add(&counted->plain, -1);
		return known;
	}
	/* One that is known when it begins was not seen to end. */
	covers = controller.lookup(&index);
	if (known || !covers || !*covers || !only_faults(call) || plain.update(&who, &space))
		return false;
	__sync_fetch_and_add(&counted->plain, 1);
	__sync_fetch_and_add(&counted->begun, 1);
	return true;
}
#else
static __always_inline u64 current_call(struct user_state *user)
{
	return NO_CALL;
}

static __always_inline bool moves_tables(u64 call, struct user_state *user)
{
	return true;
}

static __always_inline bool maps(u64 call)
{
	return true;
}

static __always_inline bool joins_nothing(u64 call)
{
	return false;
}

static __always_inline bool writes_behind(u64 call)
{
	return false;
}

static __always_inline bool is_plain(struct visits *counted, u64 who, u64 space, u64 call, bool over)
{
	return false;
}
#endif

#ifndef OLD_KERNEL /* it has no such tracepoints */
/*
 * Whether the lock is taken, or was, to change the address space. It can be had for reading by
 * whoever holds it for writing: then it is let go as one for reading, too.
 */
static __always_inline bool changes(struct visits *counted, u64 who, bool writes, bool over)
{
	bool did = counted->writer == who;

	if (over && did)
		counted->writer = 0;
	if (!over && writes)
		counted->writer = who;
	return writes || did;
}

/* The first eight bytes of these names. */
#define KSMD 0x646d736bULL
#define KHUGEPAGED 0x676170656775686bULL

/*
 * Whether this visit may put other pages in place, or move them, so that their soft-dirty bits are
 * lost: KSM by merging, uprobes by a breakpoint, mremap by whole page tables. Others who want the
 * lock for writing are rare, but for the thread that makes huge pages: those are dirty as a whole.
 */
static __always_inline bool replaces(bool at_home, bool for_reading, u64 call,
				     struct user_state *user)
{
	char name[16] = {};

	if (at_home)
		return !for_reading && moves_tables(call, user);
	bpf_get_current_comm(name, sizeof(name));

	u64 begins = *(u64 *)name;

	return for_reading ? begins == KSMD : begins != KHUGEPAGED || call != NO_CALL;
}

/*
 * Who takes the lock of an address space may change memory without a page fault: pages that the
 * kernel writes to for somebody, or discards. Counted when it is taken, for what goes on meanwhile,
 * and when it is let go, for what began earlier. A fault in kernel mode takes the lock itself and is
 * no reason to count: it is marked. Nor is a plain visit, or a fault in user mode; that takes this lock
 * always before Linux 6.4, and at times later, and the stack may grow by it. What the controller does
 * changes nothing.
 */
static __always_inline void visit(u64 space, bool writes, bool over)
{
	u64 who = bpf_get_current_pid_tgid();
	u32 tgid = who >> 32;
	int ours = CONTROLLER_TGID, own = CONTROLLER_MM, last = CONTROLLER_VISITED;
	u64 *value = controller.lookup(&ours);

	if (value && *value == tgid) {
		value = controller.lookup(&own);
		if (value && *value != space)
			controller.update(&last, &space);
		return;
	}

	struct visits *counted = visits.lookup(&space);

	if (!counted)
		return;

	bool for_reading = !changes(counted, who, writes, over);
	u32 *fault = faulting.lookup(&who);
	bool faults = fault, marked = fault && *fault;

	if (fault && over)
		faulting.delete(&who);
	if (marked && for_reading)
		return;

	struct user_state user = {};
	u64 call = current_call(&user);

	value = homes.lookup(&tgid);

	bool at_home = value && *value == space;

	if (at_home && for_reading && call == EXCEPTION) {
		__sync_fetch_and_add(&counted->faulted, 1);
		return;
	}
	if (!at_home || (!faults && writes_behind(call)))
		__sync_fetch_and_add(&counted->foreign, 1);
	if (replaces(at_home, for_reading, call, &user))
		__sync_fetch_and_add(&counted->replaced, 1);
	if (at_home && !for_reading && maps(call))
		__sync_fetch_and_add(&counted->grown, 1);
	if (at_home && !for_reading && !joins_nothing(call))
		__sync_fetch_and_add(&counted->remade, 1);
	if (!for_reading || !is_plain(counted, who, space, call, over))
		__sync_fetch_and_add(&counted->all, 1);
}

RAW_TRACEPOINT_PROBE(mmap_lock_released)
{
	visit(ctx->args[0], ctx->args[LOCK_WRITE_ARG], true);
	return 0;
}

/*
 * Every change of the address space takes its lock for writing: system calls, stack growth, and
 * what io_uring does on the target's behalf. Far rarer than system calls, and nothing is missed.
 */
RAW_TRACEPOINT_PROBE(mmap_lock_acquire_returned)
{
#ifdef VMA_MM_OFFSET
	if (!ctx->args[LOCK_WRITE_ARG + 1]) /* it was tried, in vain */
		return 0;
#endif
	visit(ctx->args[0], ctx->args[LOCK_WRITE_ARG], false);
	if (!ctx->args[LOCK_WRITE_ARG])
		return 0;

	u32 tgid = bpf_get_current_pid_tgid() >> 32;
	struct target *target = targets.lookup(&tgid);

	if (target)
		__sync_fetch_and_add(&target->map_changes, 1);
	return 0;
}
#endif

/* Attached only where soft-dirty bits are used: whoever clears the bit of a page on its way to other
 * memory does not protect it. The kernel passes here while it holds the lock of that page table. */
int migrating(struct bpf_raw_tracepoint_args *ctx)
{
	count(TOTAL_MIGRATIONS);
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

	count(targets.update(&child, &added) ? TOTAL_LOST_CHILDREN : TOTAL_CHILDREN);
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
