/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the BPF programs and the controller share. Widths are fixed and sizes asserted here and in
 * crtrace/track/dirty.py; change both together.
 */
#ifndef CRTRACE_TRACK_H
#define CRTRACE_TRACK_H

#define REGION_SHIFT 21 /* a region is 2 MiB: 512 pages, one bit each */
#define PAGE_SHIFT_4K 12
#define REGION_WORDS 8

/* Process numbers are those of the initial PID namespace, whatever namespace crtrace runs in. */
struct region_key {
	__u32 number; /* of the process that writes; or of the address space that others write to */
	__u32 reserved;
	__u64 region; /* address >> REGION_SHIFT */
};

/* Added to the number under which a page is marked that has its mark already. */
#define MARKED_AGAIN 0x40000000u

struct region_bits {
	__u64 word[REGION_WORDS]; /* bit n of the region: page n was written */
};

struct target {
	__u64 faults;      /* write faults: pages written since they were armed, or for the first time */
	__u64 lost;        /* marks that found no room in the map */
	__u64 map_changes; /* times its own threads took the address space for writing */
	__u32 threads;     /* living threads, kept for followed children only */
	__u32 flags;
};

/* Visits of an address space: somebody holds its lock. A plain one changes memory by page faults
 * only, all of which are marked. */
struct visits {
	__u64 all;     /* but plain ones, and those told apart next */
	__u64 faulted; /* by page faults of its own threads in user mode, where these take the lock */
	__u64 foreign; /* those of processes that do not run in the address space, and of
			  its own that write as those do; plain or not */
	__u64 written; /* faults that were marked under `number` */
	__u64 begun;   /* plain visits */
	__u64 plain;   /* those of them that are not over; behind `begun`, which it is read after */
	__u64 writer;  /* the thread that is changing the address space */
	__u64 replaced; /* those that may have lost soft-dirty bits */
	__u64 grown;   /* those that may have joined a new mapping with an old one */
	__u64 remade;  /* those that may have joined two old ones */
	__u32 number;  /* what the writes of others are marked under; that of no process */
	__u32 reserved;
};

#define TARGET_FOLLOW 1u /* its children become targets too */
#define TARGET_CHILD 2u  /* added here at fork, not by the controller */
#define TARGET_SHARES 4u /* it still has the address space of the process that made it */

/* Counters of the whole set of programs, by index in the array map `totals`. */
enum total {
	TOTAL_LOST_CHILDREN, /* forks that found no room among the targets */
	TOTAL_CHILDREN,      /* forks that were followed */
	TOTAL_UNTOLD,        /* regions that found no room in the ring */
	TOTAL_MIGRATIONS,    /* pages that were about to be moved to other memory, if asked for */
	TOTAL_COUNT
};

/* What the controller tells of itself, and learns, by index in the array map `controller`. An
 * address space is named by the address of its mm_struct, which nobody reads through. */
enum controller {
	CONTROLLER_TGID,    /* its number in the initial PID namespace */
	CONTROLLER_MM,      /* its own address space */
	CONTROLLER_VISITED, /* the one that it looked at last, other than its own */
	CONTROLLER_COVERS,  /* whether plain visits are spared: all that they do is marked */
	CONTROLLER_COUNT
};

_Static_assert(sizeof(struct region_key) == 16, "region_key");
_Static_assert(sizeof(struct region_bits) == 64, "region_bits");
_Static_assert(sizeof(struct target) == 32, "target");
_Static_assert(sizeof(struct visits) == 88, "visits");

#endif
