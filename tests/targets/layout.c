/*
 * One of every kind of mapping, and commands that change them between epochs.
 *
 * For each page the target knows what must be there, as a number that the harness can turn into
 * the same 4096 bytes: 0 zeros, S > 0 pattern(S, page), -S its first half and then zeros, null
 * cannot be read from outside. "seeds NAME" tells.
 *
 * Options: --pages N (64, at least 16), --file PATH (READY_FIFO.file; also PATH.shared and so on).
 * Commands, each on a range of pages of an area where it says so:
 *   areas                              addresses and sizes, JSON
 *   seeds NAME                         what every page must hold, JSON
 *   write|pwrite NAME page count seed  store a pattern, through the mapping or its descriptor
 *   half|zero|read NAME page count     store half a page of pattern 7, store zeros, load
 *   dontneed|punch|guard NAME page count
 *                                      MADV_DONTNEED, MADV_REMOVE, MADV_GUARD_INSTALL
 *   fixed NAME page count              a new mapping over the old one
 *   mmap NAME pages · munmap NAME      a new private anonymous area; drop one
 *   mremap NAME [pages]                move elsewhere, growing or shrinking to so many pages
 *   brk +N|-N                          grow or shrink the heap by pages
 *   mprotect NAME none|ro|rw
 *   fork [pages]                       a child writes anon_written (pattern 77) and pauses
 *   exec PATH [ARGUMENT...]            without arguments, PATH is a target and gets the same FIFOs
 *   check
 */
#include "target.h"

#include <sys/ipc.h>
#include <sys/shm.h>

#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#endif

#define FILE_SEED 9
#define HALF_SEED 7
#define UNREADABLE INT64_MIN
#define MAX_AREAS 64
#define MAX_PAGES 4096 /* of an area whose pages are known */
#define STACK_PAGES 16
#define HUGE_PAGE (2ul << 20)

enum kind { ANON, PRIVATE_FILE, SHARED, LOCKED_AWAY, HUGE };

static struct mapping {
	char name[24];
	char *at;
	size_t pages;
	int fd, prot;
	enum kind kind;
	bool pinned;	       /* part of something larger: not to be moved or unmapped */
	int64_t *seeds, *base; /* what is there, and what is there after MADV_DONTNEED */
} areas[MAX_AREAS];

static int64_t seed_pool[MAX_AREAS][2][MAX_PAGES];
static struct text text;
static long pages;
static pid_t children[64];
static int child_count;

static struct mapping *find(const char *name)
{
	for (int i = 0; i < MAX_AREAS; i++)
		if (areas[i].name[0] && !strcmp(areas[i].name, name))
			return &areas[i];
	return NULL;
}

static struct mapping *add(const char *name, void *at, size_t count, int fd, enum kind kind)
{
	if (at == MAP_FAILED || at == NULL)
		die(name);
	for (int i = 0; i < MAX_AREAS; i++) {
		struct mapping *m = &areas[i];

		if (m->name[0])
			continue;
		*m = (struct mapping){ .at = at,
				       .pages = count,
				       .fd = fd,
				       .kind = kind,
				       .prot = PROT_READ | PROT_WRITE,
				       .seeds = seed_pool[i][0],
				       .base = seed_pool[i][1] };
		snprintf(m->name, sizeof(m->name), "%s", name);
		memset(seed_pool[i], 0, sizeof(seed_pool[i]));
		return m;
	}
	errno = ENOSPC;
	die(name);
	return NULL;
}

/* Where a page of a file cannot be loaded, storing is out of the question too. */
static bool writable(const struct mapping *m, size_t page, size_t count)
{
	if (!(m->prot & PROT_WRITE) || page + count > m->pages || m->pages > MAX_PAGES)
		return false;
	for (size_t p = page; p < page + count; p++)
		if (m->seeds[p] == UNREADABLE)
			return false;
	return true;
}

static void store(struct mapping *m, size_t page, size_t count, int64_t seed)
{
	for (size_t p = page; p < page + count; p++) {
		uint64_t *at = (uint64_t *)(m->at + p * PAGE);

		if (seed > 0)
			pattern_write(at, seed, p);
		else if (seed == 0)
			memset(at, 0, PAGE);
		for (size_t i = 0; seed < 0 && i < PAGE_WORDS; i++)
			at[i] = i < PAGE_WORDS / 2 ? pattern_word(-seed, p, i) : 0;
		m->seeds[p] = seed;
	}
}

static void expect(struct mapping *m, size_t page, size_t count, int64_t seed)
{
	for (size_t p = page; p < page + count; p++)
		m->seeds[p] = m->base[p] = seed;
}

static void touch(const struct mapping *m, size_t page, size_t count)
{
	for (size_t p = page; p < page + count; p++)
		(void)*(volatile char *)(m->at + p * PAGE);
}

/* --- set-up, one function for each family of mappings --- */

static struct mapping *anon(const char *name, size_t count)
{
	return add(name, map_anon(count * PAGE), count, -1, ANON);
}

static void setup_anon(void)
{
	struct mapping *m = anon("anon_written", pages);
	store(m, 0, pages, 1);

	anon("anon_unwritten", pages);

	m = anon("anon_partial", pages); /* some pages, some of them by half, the rest never */
	store(m, 2, 5, 2);
	store(m, 10, 3, -2);

	m = anon("zero_read", pages);
	touch(m, 0, pages);
	m = anon("zero_written", pages);
	store(m, 0, pages, 0);

	m = anon("dontneed", pages);
	store(m, 0, pages, 3);
	madvise(m->at + 4 * PAGE, 8 * PAGE, MADV_DONTNEED);
	expect(m, 4, 8, 0);

	m = anon("prot_none", pages);
	store(m, 0, pages, 4);
	m->prot = PROT_NONE;
	mprotect(m->at, pages * PAGE, m->prot);

	m = anon("read_only", pages);
	store(m, 0, pages, 5);
	m->prot = PROT_READ;
	mprotect(m->at, pages * PAGE, m->prot);

	m = anon("guard", pages); /* guard pages, where the kernel has them, are holes that fault */
	store(m, 0, pages, 6);
	if (!madvise(m->at + 2 * PAGE, 2 * PAGE, MADV_GUARD_INSTALL))
		expect(m, 2, 2, UNREADABLE);
}

static int make_file(const char *suffix, size_t bytes)
{
	static char words[PAGE] __attribute__((aligned(PAGE)));
	char path[4096], fallback[4000];

	snprintf(fallback, sizeof(fallback), "%s.file", target_argv[1]);
	snprintf(path, sizeof(path), "%s%s", option_text("--file", fallback), suffix);
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	for (size_t at = 0; fd >= 0 && at < bytes; at += PAGE) {
		pattern_write(words, FILE_SEED, at / PAGE);
		if (pwrite(fd, words, bytes - at < PAGE ? bytes - at : PAGE, at) < 0)
			die(path);
	}
	if (fd < 0 || (!strncmp(suffix, ".gone", 5) && unlink(path)))
		die(path);
	return fd;
}

static struct mapping *mapped(const char *name, int fd, size_t count, enum kind kind, int64_t seed)
{
	void *at = mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE,
			kind == SHARED ? MAP_SHARED : MAP_PRIVATE, fd, 0);
	struct mapping *m = add(name, at, count, fd, kind);

	expect(m, 0, count, seed);
	return m;
}

static void setup_files(void)
{
	size_t bytes = pages * PAGE;
	struct mapping *m =
		mapped("file_private", make_file("", bytes), pages, PRIVATE_FILE, FILE_SEED);
	store(m, 1, 1, 11);
	store(m, 5, 3, 11);

	m = mapped("file_clean", m->fd, pages, PRIVATE_FILE, FILE_SEED);
	touch(m, 0, pages);

	m = mapped("file_shared", make_file(".shared", bytes), pages, SHARED, FILE_SEED);
	store(m, 0, 4, 12);

	m = mapped("deleted_private", make_file(".gone", bytes), pages, PRIVATE_FILE, FILE_SEED);
	store(m, 3, 2, 13);
	m = mapped("deleted_shared", make_file(".gone-shared", bytes), pages, SHARED, FILE_SEED);
	store(m, 3, 2, 14);

	/* The file ends half way through page 2: the rest of it is zeros, page 3 a SIGBUS. */
	m = mapped("file_tail", make_file(".tail", 2 * PAGE + PAGE / 2), 4, PRIVATE_FILE,
		   FILE_SEED);
	expect(m, 2, 1, -FILE_SEED);
	expect(m, 3, 1, UNREADABLE);
}

static int sized(int fd, const char *what)
{
	if (fd < 0 || ftruncate(fd, pages * PAGE))
		die(what);
	return fd;
}

static void setup_shared(void)
{
	void *at =
		mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	store(add("anon_shared", at, pages, -1, SHARED), 0, pages / 2, 21);

	int fd = sized(memfd_create("crtrace-target", MFD_CLOEXEC), "memfd");
	store(mapped("memfd_shared", fd, pages, SHARED, 0), 0, pages / 2, 22);

	fd = sized(memfd_create("crtrace-private", MFD_CLOEXEC), "memfd");
	store(mapped("memfd_private", fd, pages, PRIVATE_FILE, 0), 2, 4, 23);

	int id = shmget(IPC_PRIVATE, pages * PAGE, IPC_CREAT | 0600);
	at = shmat(id, NULL, 0);
	shmctl(id, IPC_RMID, NULL); /* goes with the last process attached */
	if (at == (void *)-1)
		die("shmat");
	store(add("sysv", at, pages, -1, SHARED), 0, pages / 2, 24);

	fd = syscall(SYS_memfd_secret, O_CLOEXEC);
	if (fd < 0) /* off unless the kernel was booted with secretmem.enable */
		return;
	at = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, sized(fd, "secret"), 0);
	struct mapping *m = at == MAP_FAILED ? NULL : add("secret", at, 4, fd, LOCKED_AWAY);
	if (m)
		store(m, 0, 4, 25);
}

static void setup_special(char *stack)
{
	size_t tera = 1ul << 40;
	char *reserve =
		mmap(NULL, tera, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	struct mapping *m = add("reserve", reserve, tera / PAGE, -1, ANON);
	m->prot = PROT_NONE;
	m->pinned = true;

	/* What an arena allocator does with a reserve: a few pages of it come to life. */
	m = add("reserve_used", reserve + tera / 2, 8, -1, ANON);
	m->pinned = true;
	if (mprotect(m->at, 8 * PAGE, PROT_READ | PROT_WRITE))
		die("mprotect");
	store(m, 1, 2, 31);

	char *thp = map_anon(3 * HUGE_PAGE);
	thp = (char *)(((uintptr_t)thp + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1));
	m = add("thp", thp, 2 * HUGE_PAGE / PAGE, -1, ANON);
	madvise(thp, 2 * HUGE_PAGE, MADV_HUGEPAGE);
	store(m, 0, HUGE_PAGE / PAGE + 8, 32);

	void *huge = mmap(NULL, HUGE_PAGE, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
	if (huge != MAP_FAILED)
		store(add("hugetlb", huge, HUGE_PAGE / PAGE, -1, HUGE), 0, HUGE_PAGE / PAGE, 33);

	m = add("stack", stack, STACK_PAGES, -1, ANON);
	m->pinned = true;
	store(m, 0, STACK_PAGES, 34);

	/* Nothing here uses malloc, so the heap above this point is ours to grow and shrink. */
	char *heap = sbrk(0);
	if (sbrk(-(uintptr_t)heap % PAGE) == (void *)-1 ||
	    (heap = sbrk(pages * PAGE)) == (void *)-1)
		die("sbrk");
	m = add("brk", heap, pages, -1, ANON);
	m->pinned = true;
	store(m, 0, pages / 2, 35);
}

/* Leave written pages far below the stack pointer, as a deep recursion does. */
__attribute__((noinline)) static void use_stack(int depth)
{
	volatile char frame[PAGE];

	frame[0] = (char)depth;
	if (depth)
		use_stack(depth - 1);
	frame[1] = frame[0];
}

/* --- checking --- */

/* Protected pages are read through /proc: changing their protection would be visible. */
static bool page_holds(const struct mapping *m, size_t p)
{
	static char copy[PAGE] __attribute__((aligned(PAGE)));
	static const char zeros[PAGE];
	const char *at = m->at + p * PAGE;
	int64_t seed = m->seeds[p];

	if (seed == UNREADABLE || (m->kind == LOCKED_AWAY && !(m->prot & PROT_READ)))
		return true;
	if (!(m->prot & PROT_READ)) {
		int fd = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
		ssize_t got = pread(fd, copy, PAGE, (off_t)at);

		close(fd);
		if (got != PAGE)
			return false;
		at = copy;
	}
	if (seed > 0)
		return pattern_holds(at, seed, p);
	if (seed == 0)
		return !memcmp(at, zeros, PAGE);
	for (size_t i = 0; i < PAGE_WORDS / 2; i++)
		if (((const uint64_t *)at)[i] != pattern_word(-seed, p, i))
			return false;
	return !memcmp(at + PAGE / 2, zeros, PAGE / 2);
}

static bool check(void)
{
	for (int i = 0; i < MAX_AREAS; i++) {
		const struct mapping *m = &areas[i];

		for (size_t p = 0; m->name[0] && m->pages <= MAX_PAGES && p < m->pages; p++)
			if (!page_holds(m, p)) {
				fprintf(stderr, "%s page %zu at %p: not %ld\n", m->name, p,
					(void *)(m->at + p * PAGE), m->seeds[p]);
				return false;
			}
	}
	return true;
}

/* --- commands --- */

static void put_areas(void)
{
	const char *comma = "";

	put(&text, "{");
	for (int i = 0; i < MAX_AREAS; i++) {
		const struct mapping *m = &areas[i];

		if (!m->name[0])
			continue;
		put(&text,
		    "%s\"%s\": {\"addr\": %lu, \"pages\": %zu, \"prot\": %d, \"shared\": %s}",
		    comma, m->name, (uint64_t)m->at, m->pages, m->prot,
		    m->kind == SHARED || m->kind == LOCKED_AWAY ? "true" : "false");
		comma = ", ";
	}
	put(&text, "}");
}

static void say_areas(void)
{
	text.length = 0;
	put_areas();
	say("%s", text.bytes);
}

static void say_seeds(const struct mapping *m)
{
	text.length = 0;
	put(&text, "[");
	for (size_t p = 0; p < m->pages && m->pages <= MAX_PAGES; p++) {
		put(&text, p ? ", " : "");
		if (m->seeds[p] == UNREADABLE || m->kind == LOCKED_AWAY)
			put(&text, "null");
		else
			put(&text, "%ld", m->seeds[p]);
	}
	put(&text, "]");
	say("%s", text.bytes);
}

static bool advise(struct mapping *m, size_t page, size_t count, int advice)
{
	if (madvise(m->at + page * PAGE, count * PAGE, advice))
		return false;
	for (size_t p = page; p < page + count; p++)
		if (advice == MADV_REMOVE)
			m->seeds[p] = m->base[p] = 0;
		else if (m->kind != SHARED && m->kind != LOCKED_AWAY)
			m->seeds[p] = m->base[p];
	return true;
}

/* Through the descriptor: a write that neither a page fault nor a write-protect scan shows. */
static bool write_through(struct mapping *m, size_t page, size_t count, int64_t seed)
{
	static char words[PAGE] __attribute__((aligned(PAGE)));

	if (m->fd < 0 || m->kind != SHARED)
		return false;
	for (size_t p = page; p < page + count; p++) {
		pattern_write(words, seed, p);
		if (pwrite(m->fd, words, PAGE, p * PAGE) != (ssize_t)PAGE)
			return false;
		m->seeds[p] = seed;
	}
	return true;
}

/* Commands of the form VERB NAME page count [seed]. */
static bool on_pages(const char *verb, struct mapping *m, size_t page, size_t count, int64_t seed)
{
	if (page > m->pages || count > m->pages - page || m->pages > MAX_PAGES)
		return false;
	if (!strcmp(verb, "dontneed"))
		return advise(m, page, count, MADV_DONTNEED);
	if (!strcmp(verb, "punch"))
		return m->kind == SHARED && advise(m, page, count, MADV_REMOVE);
	if (!strcmp(verb, "guard"))
		return !madvise(m->at + page * PAGE, count * PAGE, MADV_GUARD_INSTALL);
	if (!strcmp(verb, "pwrite"))
		return write_through(m, page, count, seed);
	if (!strcmp(verb, "read")) {
		if (!(m->prot & PROT_READ) || !writable(m, page, 0))
			return false;
		touch(m, page, count);
		return true;
	}
	if (!writable(m, page, count))
		return false;
	if (!strcmp(verb, "fixed")) {
		if (m->pinned || m->kind != ANON ||
		    mmap(m->at + page * PAGE, count * PAGE, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
			return false;
		expect(m, page, count, 0);
		return true;
	}
	if (!strcmp(verb, "write") && seed > 0)
		store(m, page, count, seed);
	else if (!strcmp(verb, "half"))
		store(m, page, count, -HALF_SEED);
	else if (!strcmp(verb, "zero"))
		store(m, page, count, 0);
	else
		return false;
	return true;
}

static bool move(struct mapping *m, size_t count)
{
	if (m->pinned || count > MAX_PAGES || (count > m->pages && m->kind != ANON))
		return false;
	void *place = mmap(NULL, count * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	void *at =
		mremap(m->at, m->pages * PAGE, count * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place);

	if (at == MAP_FAILED) {
		munmap(place, count * PAGE);
		return false;
	}
	if (count > m->pages)
		expect(m, m->pages, count - m->pages, 0);
	m->at = at;
	m->pages = count;
	return true;
}

static bool change_brk(long by)
{
	struct mapping *m = find("brk");
	long count = (long)m->pages + by;

	if (count < 0 || count > MAX_PAGES || sbrk(by * (long)PAGE) == (void *)-1)
		return false;
	if (by > 0)
		expect(m, m->pages, by, 0);
	m->pages = count;
	return true;
}

static bool protect(struct mapping *m, const char *to)
{
	int prot = !strcmp(to, "none") ? PROT_NONE
		   : !strcmp(to, "ro") ? PROT_READ
		   : !strcmp(to, "rw") ? PROT_READ | PROT_WRITE
				       : -1;

	if (prot < 0 || m->pages > MAX_PAGES || mprotect(m->at, m->pages * PAGE, prot))
		return false;
	m->prot = prot;
	return true;
}

/* The child has its own memory: what it writes must not show here. Returns 0 when it failed. */
static pid_t fork_writer(size_t count)
{
	struct mapping *m = find("anon_written");
	int ends[2];
	char byte;

	if (!m || !writable(m, 0, count) || child_count == 64 || pipe(ends))
		return 0;
	pid_t child = fork();
	if (child == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		signal(SIGTERM, SIG_DFL);
		store(m, 0, count, 77);
		if (write(ends[1], "", 1) != 1)
			_exit(1);
		for (;;)
			pause();
	}
	close(ends[1]);
	bool up = child > 0 && read(ends[0], &byte, 1) == 1;
	close(ends[0]);
	if (child > 0)
		children[child_count++] = child;
	return up ? child : 0;
}

static void execute(char *path, char *rest)
{
	char *argv[32] = { path, target_argv[1], target_argc > 2 ? target_argv[2] : NULL };
	int count = 1;

	for (char *word = strtok(rest, " "); word && count < 31; word = strtok(NULL, " "))
		argv[count++] = word;
	if (count > 1)
		argv[count] = NULL;
	say("ok");
	execv(path, argv);
	die(path);
}

static void obey(char *line)
{
	char verb[24] = "", name[256] = "", word[24] = "";
	long page = 0, count = 0, seed = 0;
	int after = 0;

	sscanf(line, "%23s %255s%n", verb, name, &after);
	sscanf(line + after, "%23s", word);
	int numbers = sscanf(line + after, "%ld %ld %ld", &page, &count, &seed);
	struct mapping *m = find(name);

	if (!strcmp(verb, "areas"))
		return say_areas();
	if (!strcmp(verb, "check"))
		return say("%s", check() ? "ok" : "bad");
	if (!strcmp(verb, "brk"))
		return say("%s", change_brk(atol(name)) ? "ok" : "bad");
	if (!strcmp(verb, "fork")) {
		pid_t child = fork_writer(name[0] ? atol(name) : 4);
		return child ? say("ok %d", child) : say("bad fork");
	}
	if (!strcmp(verb, "exec"))
		return execute(name, line + after);
	if (!strcmp(verb, "mmap")) {
		if (m || page < 1 || page > MAX_PAGES)
			return say("bad size or name");
		return say("ok %lu", (uint64_t)anon(name, page)->at);
	}
	if (!m)
		return say("bad no area or command: %s", line);
	if (!strcmp(verb, "seeds"))
		return say_seeds(m);
	if (!strcmp(verb, "munmap")) {
		bool done = !m->pinned && !munmap(m->at, m->pages * PAGE);
		if (done)
			m->name[0] = 0;
		return say("%s", done ? "ok" : "bad");
	}
	if (!strcmp(verb, "mremap"))
		return move(m, numbers > 0 ? (size_t)page : m->pages)
			       ? say("ok %lu", (uint64_t)m->at)
			       : say("bad");
	if (!strcmp(verb, "mprotect"))
		return say("%s", protect(m, word) ? "ok" : "bad");
	return say("%s", on_pages(verb, m, page, count, seed) ? "ok" : "bad");
}

int main(int argc, char **argv)
{
	char stack[STACK_PAGES * PAGE] __attribute__((aligned(PAGE)));
	char line[4096];

	target_begin(argc, argv);
	pages = option("--pages", 64);
	if (pages < 16 || pages > MAX_PAGES) {
		errno = EINVAL;
		die("--pages");
	}
	use_stack(256);
	setup_anon();
	setup_files();
	setup_shared();
	setup_special(stack);
	put(&text, "{\"pid\": %d, \"areas\": ", getpid());
	put_areas();
	put(&text, "}");
	say_ready(&text);
	while (target_command(line, sizeof(line)))
		obey(line);
	for (int i = 0; i < child_count; i++) {
		kill(children[i], SIGKILL);
		waitpid(children[i], NULL, 0);
	}
	/* Not by returning: what then runs would use the pages of `stack`, maybe protected by now. */
	exit(check() ? 0 : 1);
}
