/*
 * Memory that the kernel writes without a page fault: fixed buffers of io_urings, and buffers of
 * direct reads. One area of 64 pages; every range of pages is one of it.
 *
 * Commands (rings are numbered from 0 in the order in which they were made):
 *   ring [unmapped|hidden]        a ring; its memory among our own; the same without a descriptor
 *   register RING page count      one fixed buffer, 100 bytes shorter and later than its pages
 *   sparse RING places            a table of fixed buffers without any
 *   place RING at page count      put a buffer into a place of a sparse table
 *   clone FROM TO                 share the buffers of another ring
 *   unregister RING · close RING
 *   fixed RING page byte          read a page of this byte from a pipe into buffer 0, by the ring
 *   open PATH                     for direct reading
 *   submit page · await           begin to read one page by AIO; wait for its end
 *   huge RING                     register two pages of a huge page
 *   card                          share the area with a network card
 *   uffd features                 a userfaultfd
 */
#include "target.h"

#include <linux/aio_abi.h>
#include <linux/if_xdp.h>
#include <linux/io_uring.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>

#ifndef IORING_SETUP_NO_MMAP
#define IORING_SETUP_NO_MMAP (1u << 14)
#endif
#ifndef IORING_SETUP_REGISTERED_FD_ONLY
#define IORING_SETUP_REGISTERED_FD_ONLY (1u << 15)
#endif
#ifndef IORING_SETUP_NO_SQARRAY
#define IORING_SETUP_NO_SQARRAY (1u << 16)
#endif
#define USE_REGISTERED_RING (1u << 31)
#define CLONE_BUFFERS 30
#define AREA_PAGES 64
#define MAX_RINGS 16
#define HUGE_PAGE (2ul << 20)

struct ring {
	int fd;
	bool hidden;
	char *at;
	struct io_uring_sqe *sqes;
	struct io_uring_params params;
};

static struct ring rings[MAX_RINGS];
static int ring_count, direct = -1;
static char *area;
static aio_context_t aio;

/* Two pages for a ring of our own making: the offsets of old headers have no name for them. */
static void lend_memory(struct io_uring_params *params)
{
	char *memory = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
			    0);
	uint64_t entries = (uint64_t)memory, submissions = entries + PAGE;

	memcpy((char *)&params->cq_off + sizeof(params->cq_off) - 8, &entries, 8);
	memcpy((char *)&params->sq_off + sizeof(params->sq_off) - 8, &submissions, 8);
	params->flags |= IORING_SETUP_NO_MMAP | IORING_SETUP_NO_SQARRAY;
}

/* A no-op, the all-zero submission, whose completion the kernel writes into what was lent. */
static bool complete_one(const struct ring *ring)
{
	uint64_t entries;

	memcpy(&entries, (const char *)&ring->params.cq_off + sizeof(ring->params.cq_off) - 8, 8);
	__atomic_store_n((uint32_t *)(entries + ring->params.sq_off.tail), 1, __ATOMIC_RELEASE);
	return syscall(SYS_io_uring_enter, ring->fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) == 1;
}

static bool make_ring(const char *kind)
{
	struct ring *ring = &rings[ring_count];
	struct io_uring_params *params = &ring->params;

	if (ring_count == MAX_RINGS)
		return false;
	*ring = (struct ring){ 0 };
	ring->hidden = !strcmp(kind, "hidden");
	if (ring->hidden || !strcmp(kind, "unmapped"))
		lend_memory(params);
	if (ring->hidden)
		params->flags |= IORING_SETUP_REGISTERED_FD_ONLY;
	ring->fd = syscall(SYS_io_uring_setup, 4, params);
	if (ring->fd < 0)
		return false;
	ring_count++;
	if (params->flags & IORING_SETUP_NO_MMAP)
		return ring->hidden || complete_one(ring);
	size_t size = params->sq_off.array + params->sq_entries * sizeof(uint32_t);
	size_t completions =
		params->cq_off.cqes + params->cq_entries * sizeof(struct io_uring_cqe);

	ring->at = mmap(NULL, size > completions ? size : completions, PROT_READ | PROT_WRITE,
			MAP_SHARED, ring->fd, IORING_OFF_SQ_RING);
	ring->sqes = mmap(NULL, params->sq_entries * sizeof(struct io_uring_sqe),
			  PROT_READ | PROT_WRITE, MAP_SHARED, ring->fd, IORING_OFF_SQES);
	return ring->at != MAP_FAILED && ring->sqes != MAP_FAILED;
}

static bool ring_register(const struct ring *ring, unsigned int what, void *argument,
			  unsigned int count)
{
	if (ring->hidden)
		what |= USE_REGISTERED_RING;
	return syscall(SYS_io_uring_register, ring->fd, what, argument, count) >= 0;
}

static struct iovec pages_of_area(long page, long count)
{
	return (struct iovec){ area + page * PAGE, count * PAGE };
}

static bool register_buffer(const struct ring *ring, long page, long count)
{
	struct iovec span = pages_of_area(page, count);

	span.iov_base = (char *)span.iov_base + 100;
	span.iov_len -= 200;
	return ring_register(ring, IORING_REGISTER_BUFFERS, &span, 1);
}

static bool sparse(const struct ring *ring, long places)
{
	struct io_uring_rsrc_register table = { .nr = places, .flags = 1 /* sparse */ };

	return ring_register(ring, IORING_REGISTER_BUFFERS2, &table, sizeof(table));
}

static bool place(const struct ring *ring, long at, long page, long count)
{
	struct iovec span = pages_of_area(page, count);
	struct io_uring_rsrc_update2 update = { .offset = at, .data = (uint64_t)&span, .nr = 1 };

	return ring_register(ring, IORING_REGISTER_BUFFERS_UPDATE, &update, sizeof(update));
}

static bool clone_buffers(const struct ring *from, const struct ring *to)
{
	uint32_t words[8] = { from->fd };

	return ring_register(to, CLONE_BUFFERS, words, 1);
}

/* Huge pages are counted as a whole, however little of them is registered. */
static bool huge(const struct ring *ring)
{
	uintptr_t at = (uintptr_t)map_anon(2 * HUGE_PAGE);
	char *page = (char *)((at + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1));
	struct iovec span = { page + 5 * PAGE, 2 * PAGE };

	if (madvise(page, HUGE_PAGE, MADV_HUGEPAGE))
		return false;
	memset(page, 1, HUGE_PAGE);
	return ring_register(ring, IORING_REGISTER_BUFFERS, &span, 1);
}

static bool read_fixed(struct ring *ring, long page, int byte)
{
	static char contents[PAGE];
	uint32_t *tail = (uint32_t *)(ring->at + ring->params.sq_off.tail);
	uint32_t mask = *(uint32_t *)(ring->at + ring->params.sq_off.ring_mask);
	uint32_t *array = (uint32_t *)(ring->at + ring->params.sq_off.array);
	uint32_t *seen = (uint32_t *)(ring->at + ring->params.cq_off.head), slot = *tail & mask;
	uint32_t completion = *seen & *(uint32_t *)(ring->at + ring->params.cq_off.ring_mask);
	struct io_uring_cqe *done =
		(struct io_uring_cqe *)(ring->at + ring->params.cq_off.cqes) + completion;
	int ends[2];

	memset(contents, byte, sizeof(contents));
	if (pipe2(ends, O_CLOEXEC) || write(ends[1], contents, PAGE) != (ssize_t)PAGE)
		return false;
	ring->sqes[slot] = (struct io_uring_sqe){ .opcode = IORING_OP_READ_FIXED,
						  .fd = ends[0],
						  .off = -1ull,
						  .addr = (uint64_t)area + page * PAGE + 200,
						  .len = 1000 };
	array[slot] = slot;
	__atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
	long entered = syscall(SYS_io_uring_enter, ring->fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0);
	bool good = entered == 1 && done->res == 1000;

	__atomic_store_n(seen, *seen + 1, __ATOMIC_RELEASE);
	close(ends[0]);
	close(ends[1]);
	return good;
}

static bool submit(long page)
{
	struct iocb request = { .aio_lio_opcode = IOCB_CMD_PREAD,
				.aio_fildes = direct,
				.aio_buf = (uint64_t)area + page * PAGE,
				.aio_nbytes = PAGE };
	struct iocb *list = &request;

	return (aio || !syscall(SYS_io_setup, 4, &aio)) &&
	       syscall(SYS_io_submit, aio, 1, &list) == 1;
}

static bool await(void)
{
	struct timespec limit = { 30, 0 };
	struct io_event event;

	return syscall(SYS_io_getevents, aio, 1, 1, &event, &limit) == 1 &&
	       event.res == (long)PAGE;
}

static bool share_with_card(void)
{
	int card = socket(AF_XDP, SOCK_RAW, 0), entries = 16;
	struct xdp_umem_reg memory = { .addr = (uintptr_t)area, .len = AREA_PAGES * PAGE,
				       .chunk_size = PAGE };

	return card >= 0 && !setsockopt(card, SOL_XDP, XDP_UMEM_REG, &memory, sizeof(memory)) &&
	       !setsockopt(card, SOL_XDP, XDP_UMEM_FILL_RING, &entries, sizeof(entries)) &&
	       mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, card,
		    XDP_UMEM_PGOFF_FILL_RING) != MAP_FAILED;
}

static bool make_userfaultfd(uint64_t features)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);

	if (fd < 0) /* before Linux 5.11 */
		fd = syscall(SYS_userfaultfd, O_CLOEXEC);
	return fd >= 0 && !ioctl(fd, UFFDIO_API, &api);
}

static bool obey(const char *line)
{
	char word[16] = "", text[4096] = "";
	long a = 0, b = 0, c = 0, d = 0;

	sscanf(line, "%15s %4095s", word, text);
	sscanf(line, "%*s %ld %ld %ld %ld", &a, &b, &c, &d);
	if (!strcmp(word, "ring"))
		return make_ring(text);
	if (!strcmp(word, "open"))
		return (direct = open(text, O_RDONLY | O_DIRECT | O_CLOEXEC)) >= 0;
	if (!strcmp(word, "submit"))
		return submit(a);
	if (!strcmp(word, "await"))
		return await();
	if (!strcmp(word, "card"))
		return share_with_card();
	if (!strcmp(word, "uffd"))
		return make_userfaultfd(a);
	if (a < 0 || a >= ring_count)
		return false;
	if (!strcmp(word, "register"))
		return register_buffer(&rings[a], b, c);
	if (!strcmp(word, "sparse"))
		return sparse(&rings[a], b);
	if (!strcmp(word, "place"))
		return place(&rings[a], b, c, d);
	if (!strcmp(word, "clone"))
		return clone_buffers(&rings[a], &rings[b]);
	if (!strcmp(word, "unregister"))
		return ring_register(&rings[a], IORING_UNREGISTER_BUFFERS, NULL, 0);
	if (!strcmp(word, "close"))
		return !close(rings[a].fd);
	if (!strcmp(word, "fixed"))
		return read_fixed(&rings[a], b, c);
	return !strcmp(word, "huge") && huge(&rings[a]);
}

int main(int argc, char **argv)
{
	static struct text text;
	static char line[8192];

	target_begin(argc, argv);
	area = map_anon(AREA_PAGES * PAGE);
	memset(area, 'a', AREA_PAGES * PAGE);
	put(&text, "{\"addr\": %lu}", (uint64_t)area);
	say_ready(&text);
	while (target_command(line, sizeof(line)))
		if (obey(line))
			say("ok");
		else
			say("bad %s", strerror(errno));
	return 0;
}
