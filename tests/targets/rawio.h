/* io_uring and Linux AIO by system calls alone: one read at a time, waited for. */
#ifndef RAWIO_H
#define RAWIO_H

#include "target.h"

#include <linux/aio_abi.h>
#include <linux/io_uring.h>
#include <sys/uio.h>

struct ring {
	int fd;
	uint32_t *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
	struct io_uring_sqe *sqes;
	struct io_uring_cqe *cqes;
};

/* False where the kernel has no io_uring, or it is switched off. */
static inline bool ring_open(struct ring *ring, unsigned entries)
{
	struct io_uring_params params = { 0 };

	ring->fd = syscall(SYS_io_uring_setup, entries, &params);
	if (ring->fd < 0)
		return false;
	fcntl(ring->fd, F_SETFD, FD_CLOEXEC);
	size_t size = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
	char *queues = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->fd,
			    IORING_OFF_SQ_RING);

	ring->sqes = mmap(NULL, params.sq_entries * sizeof(struct io_uring_sqe),
			  PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->fd,
			  IORING_OFF_SQES);
	if (queues == MAP_FAILED || ring->sqes == MAP_FAILED)
		die("io_uring");
	ring->sq_tail = (uint32_t *)(queues + params.sq_off.tail);
	ring->sq_mask = (uint32_t *)(queues + params.sq_off.ring_mask);
	ring->sq_array = (uint32_t *)(queues + params.sq_off.array);
	ring->cq_head = (uint32_t *)(queues + params.cq_off.head);
	ring->cq_tail = (uint32_t *)(queues + params.cq_off.tail);
	ring->cq_mask = (uint32_t *)(queues + params.cq_off.ring_mask);
	ring->cqes = (struct io_uring_cqe *)(queues + params.cq_off.cqes);
	return true;
}

/* Submit one request and wait for its end: the result, negative errno when it failed. */
static inline int ring_do(struct ring *ring, struct io_uring_sqe request)
{
	uint32_t tail = *ring->sq_tail, at = tail & *ring->sq_mask, head = *ring->cq_head;
	unsigned submit = 1;

	ring->sqes[at] = request;
	ring->sq_array[at] = at;
	__atomic_store_n(ring->sq_tail, tail + 1, __ATOMIC_RELEASE);
	while (__atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE) == head) {
		long done = syscall(SYS_io_uring_enter, ring->fd, submit, 1, IORING_ENTER_GETEVENTS,
				    NULL, 0);

		if (done < 0 && errno != EINTR)
			die("io_uring_enter");
		submit -= done > 0;
	}
	int result = ring->cqes[head & *ring->cq_mask].res;
	__atomic_store_n(ring->cq_head, head + 1, __ATOMIC_RELEASE);
	return result;
}

static inline bool aio_read(aio_context_t context, int fd, void *to, size_t bytes, off_t from)
{
	struct iocb request = { .aio_lio_opcode = IOCB_CMD_PREAD,
				.aio_fildes = fd,
				.aio_buf = (uintptr_t)to,
				.aio_nbytes = bytes,
				.aio_offset = from };
	struct iocb *requests[] = { &request };
	struct io_event event;
	long got;

	if (syscall(SYS_io_submit, context, 1, requests) != 1)
		return false;
	do
		got = syscall(SYS_io_getevents, context, 1, 1, &event, NULL);
	while (got < 0 && errno == EINTR);
	return got == 1 && event.res == (long long)bytes;
}

#endif
