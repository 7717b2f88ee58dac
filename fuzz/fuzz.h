/*
 * The functions that all targets share: they make a session without sockets,
 * read a target's input, and compare texts.
 *
 * A target includes the source file under test, for its static functions, and
 * then this file.  fuzz/run links the other source files of the daemon except
 * clamsmtpd.c, which none of them calls.
 */

/* Leave the targets' own branches out of the coverage.  A target includes this
 * file a second time at its end, which ends the attribute. */
#ifdef FUZZ_H
#ifdef __clang__
#pragma clang attribute pop
#endif
#else
#define FUZZ_H
#ifdef __clang__
#pragma clang attribute push (__attribute__((no_sanitize("coverage"))), \
    apply_to = function)
#endif

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *, size_t);
int LLVMFuzzerInitialize(int *, char ***);
const char *__asan_default_options(void);
const char *__ubsan_default_options(void);

/* New memory is filled with letters.  A read past the received bytes finds no
 * NUL, so it reaches the end of the buffer, where the sanitizer reports it. */
const char *
__asan_default_options(void)
{
	return "max_malloc_fill_size=65536:malloc_fill_byte=65:"
	    "strict_string_checks=1:detect_stack_use_after_return=0";
}

const char *
__ubsan_default_options(void)
{
	return "print_stacktrace=1:halt_on_error=1";
}

#define CHECK(what, ...) do {						\
	if (!(what)) {							\
		fprintf(stderr, "%s:%d: not so: %s\n", __FILE__,	\
		    __LINE__, #what);					\
		fprintf(stderr, __VA_ARGS__);				\
		fputc('\n', stderr);					\
		abort();						\
	}								\
} while (0)

/* For targets that need no session. */
int LLVMFuzzerInitialize(int *, char ***) __attribute__((weak));

static int null_fd = -1;

/* Log everything to /dev/null, because the log's formats are tested, too. */
int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
	int err = dup(2);

	(void)argc, (void)argv;
	now = 1000000;
	null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
	CHECK(null_fd != -1 && err != -1, "no /dev/null");
	dup2(null_fd, 2);
	log_open(4, 1);
	dup2(err, 2);
	close(err);
	return 0;
}

/*
 * A stream is what a peer sends, and the pieces in which it arrives.  In a
 * target's input 0xFF ends a piece, and 0xFE n repeats the byte before it
 * 16 x n times, so that a small input reaches the limits.
 */
#define STREAMMAX	(1 << 16)
#define REPEATMAX	20000		/* bytes by 0xFE, in all */
#define PIECEMAX	(BUFSZ - 8192)	/* and up to 4080 more */

struct stream {
	char	 p[STREAMMAX];
	size_t	 n;
	size_t	 cut[STREAMMAX + 1];	/* the ends of pieces; the last is n */
	size_t	 ncut;
};

static __attribute__((unused)) void
stream_read(struct stream *s, const uint8_t *in, size_t len, int single_bytes)
{
	size_t i, k, last, more = REPEATMAX;

	s->n = s->ncut = 0;
	for (i = last = 0; i < len && s->n < STREAMMAX - 4096; i++)
		if (in[i] == 0xFF || s->n - last > PIECEMAX) {
			s->cut[s->ncut++] = last = s->n;
			i -= in[i] != 0xFF;
		} else if (in[i] == 0xFE && i + 1 < len && s->n > 0) {
			for (k = 16 * (size_t)in[++i]; k > 0 && more > 0;
			    k--, more--, s->n++)
				s->p[s->n] = s->p[s->n - 1];
		} else
			s->p[s->n++] = in[i];
	if (single_bytes && s->n <= 1000)
		for (s->ncut = 0; s->ncut < s->n; s->ncut++)
			s->cut[s->ncut] = s->ncut + 1;
	s->cut[s->ncut++] = s->n;
}

/* Returns a new session without sockets, in which nothing has been sent. */
static __attribute__((unused)) struct session *
new_session(struct conf *conf)
{
	struct session *s = calloc(1, sizeof *s);

	CHECK(s != NULL, "memory");
	conf->timeout = conf->scantimeout = 180 * SECOND;
	conf->maxscans = 10;
	conf->tempdir = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
	conf->refs = 2;
	s->id = 0x100000;
	s->index = -1;			/* not in the session table */
	s->conf = conf;
	s->client.fd = dup(null_fd);
	s->server.peer.fd = dup(null_fd);
	s->scan.peer.fd = s->msg.spool.fd = -1;
	s->client_addr.len = sizeof s->client_addr.u.in;
	s->client_addr.u.in.sin_family = AF_INET;
	s->peer_addr = s->client_addr;
	s->result.outcome = OUT_NONE;
	s->replay.at_bol = 1;
	s->deadline = now + conf->timeout;
	return s;
}

/* Put the next piece of a stream into a peer's buffer.  Returns 0 if it does
 * not fit yet, else 1. */
static __attribute__((unused)) int
feed(struct buf *b, const char *p, size_t n)
{
	if (n == 0)
		return 1;
	if (!buf_ready(b, n))
		return 0;
	buf_put(b, p, n);
	return 1;
}

/* Read the decimal number at p.  Returns 1 when the word at p is a number, 0
 * when it is too large (*n is then LLONG_MAX), -1 when it is not a number. */
static __attribute__((unused)) int
ref_number(const char *p, long long *n)
{
	size_t digits = strspn(p, "0123456789");

	if (digits == 0 || (p[digits] != '\0' && p[digits] != ' ' &&
	    p[digits] != '\t'))
		return -1;
	errno = 0;
	*n = strtoll(p, NULL, 10);
	return errno == 0;
}

/* A text that grows as references append to it. */
struct text {
	char	*p;
	size_t	 n, size;
};

static __attribute__((unused)) void
text_add(struct text *t, const char *p, size_t n)
{
	if (t->size - t->n < n + 1) {
		t->size = 2 * (t->n + n + 1);
		t->p = realloc(t->p, t->size);
		CHECK(t->p != NULL, "memory");
	}
	if (n > 0)
		memcpy(t->p + t->n, p, n);
	t->n += n;
	t->p[t->n] = '\0';
}

static __attribute__((unused)) void
text_puts(struct text *t, const char *p)
{
	text_add(t, p, strlen(p));
}

static __attribute__((unused)) void
text_free(struct text *t)
{
	free(t->p);
	memset(t, 0, sizeof *t);
}

/* Abort if the two texts differ, and print where. */
static __attribute__((unused)) void
same(const char *what, const char *a, size_t na, const char *b, size_t nb)
{
	size_t i, k;

	if (na == nb && (na == 0 || memcmp(a, b, na) == 0))
		return;
	for (i = 0; i < na && i < nb && a[i] == b[i]; i++)
		;
	fprintf(stderr, "%s: %zu and %zu bytes, which differ at offset %zu\n", what,
	    na, nb, i);
	for (k = 0; k < 2; k++) {
		size_t at = i > 40 ? i - 40 : 0, end = k ? nb : na;
		const char *p = k ? b : a;

		fprintf(stderr, k ? "\nreference: " : "daemon:    ");
		for (; at < end && at < i + 80; at++)
			if (p[at] >= ' ' && p[at] < 127 && p[at] != '\\')
				fputc(p[at], stderr);
			else
				fprintf(stderr, "\\x%02X", (unsigned char)p[at]);
	}
	fputc('\n', stderr);
	abort();
}
#endif
