/*
 * Proof of the body filter and of the replay by DATA.  Each string of {CR, LF,
 * '.', NUL, x} up to a length is the body of a message.  The filter gets it
 * whole, split at every point, and byte by byte, as DATA and as BDAT for a
 * next hop without CHUNKING.
 *
 * Each run is compared with the definition in fuzz/bodyref.h, which works on
 * whole strings and shares no code with the daemon.  The output is then
 * searched for everything that a next hop in the table below takes for the end
 * of data.
 */

#include <sys/types.h>
#include <sys/uio.h>

#include <stdint.h>
#include <string.h>
#include <unistd.h>

/* The spool is an array, so that millions of runs allocate nothing. */
#define spool_write array_write
#define spool_read array_read
#include "../smtp.c"
#undef spool_write
#undef spool_read
#include "../fuzz/fuzz.h"
#include "../fuzz/bodyref.h"
#include "prove.h"

#define HEADER	"X-V: c\r\n"
#define NEVER	SIZE_MAX

/*
 * The strings that next hops take for the end of data, and the position of the
 * dot in each.
 */
static const struct {
	const char *end;
	size_t	 dot;
} hops[] = {
	{ "\r\n.\r\n", 2 },		/* RFC 5321 4.1.1.4 */
	{ "\n.\n", 1 },			/* LF ends a line: CVE-2023-51764, */
	{ "\n.\r\n", 1 },		/* CVE-2023-51765 */
	{ "\r\n.\n", 2 },
	{ "\r.\r", 1 },			/* CR ends a line: CVE-2023-51766, */
	{ "\r.\r\n", 1 },		/* and Cisco's "clean" mode */
	{ "\r\n.\r", 2 },
	{ "\r.\n", 1 },
	{ "\n.\r", 1 },
	{ "\r\r\n.\r\r\n", 3 },		/* CRCRLF ends a line */
	{ "\n. ", 1 },			/* a blank after the dot */
	{ "\r. ", 1 },
	{ "\n.\0", 1 },			/* or a NUL */
	{ "\r.\0", 1 },
};
#define NHOPS	(sizeof hops / sizeof hops[0])

/* A next hop keeps NULs, drops them, or ends a line's text at one. */
enum { NUL_KEPT, NUL_DROPPED, NUL_CUTS, NNULS };

static char spool[4096];
static size_t read_cut, read_max;
static unsigned long long strings, runs;

int
array_write(struct spool *sp, struct iovec *v, int n)
{
	int i;

	for (i = 0; i < n; i++) {
		CHECK(sp->size + v[i].iov_len <= sizeof spool,
		    "the spool is full");
		memcpy(spool + sp->size, v[i].iov_base, v[i].iov_len);
		sp->size += v[i].iov_len;
	}
	return 0;
}

/* A read ends at read_cut, and returns at most read_max bytes. */
ssize_t
array_read(const struct spool *sp, void *p, size_t n, off_t off)
{
	(void)sp;
	if (n > read_max)
		n = read_max;
	if ((size_t)off < read_cut && off + n > read_cut)
		n = read_cut - off;
	memcpy(p, spool + off, n);
	return n;
}

/* Put a body through the filter, in pieces that end at cut or have step bytes.
 * Bytes that were not received follow each piece in memory.  Returns how many
 * bytes the filter took, up to the end of data. */
static size_t
filter(struct session *s, const char *p, size_t n, size_t cut, size_t step,
    int *end)
{
	char piece[128];
	size_t at = 0, len, took;

	s->msg = (struct message){ .in_bdat = s->msg.in_bdat };
	*end = 0;
	while (at < n && !*end) {
		len = n - at < step ? n - at : step;
		if (at < cut && len > cut - at)
			len = cut - at;
		memcpy(piece, p + at, len);
		memset(piece + len, 'y', 16);
		took = body_filter(s, piece, len, end);
		spool_flush(s);
		CHECK(*end || took == len, "bytes were left over");
		at += took;
	}
	runs++;
	return at;
}

static void
check_filter(struct session *s, const char *p, size_t n, size_t cut, size_t step,
    const struct text *want, int ended, size_t taken)
{
	int end;
	size_t at = filter(s, p, n, cut, step, &end);

	CHECK(end == ended && at == taken, "%s: end: %d, after %zu bytes; "
	    "definition: %d, after %zu", show(p, n), end, at, ended, taken);
	body_end(s);
	CHECK(s->result.outcome == OUT_NONE, "%s: the message is refused",
	    show(p, n));
	CHECK((size_t)s->msg.size == want->n &&
	    memcmp(spool, scan_line, scan_line_len) == 0 &&
	    memcmp(spool + scan_line_len, want->p, want->n) == 0,
	    "%s, cut at %zu, in pieces of %zd: %s is stored, not %s",
	    show(p, n), cut, (ssize_t)step, show(spool + scan_line_len, s->msg.size),
	    show(want->p, want->n));
}

/* Copy the output as a next hop that handles NULs in this way reads it.
 * Returns the length of the copy. */
static size_t
without_nuls(char *to, const char *p, size_t n, int how)
{
	size_t i, k = 0;
	int cut = 0;

	to[k++] = '\r';			/* the end of the line before */
	to[k++] = '\n';
	for (i = 0; i < n; i++) {
		cut = how != NUL_KEPT && (p[i] == '\0' ||
		    (how == NUL_CUTS && cut && p[i] != '\r' && p[i] != '\n'));
		if (!cut)
			to[k++] = p[i];
	}
	to[k] = '\0';
	return k;
}

/* Every next hop finds the end of data in the last bytes of the output, and
 * only there. */
static void
check_hops(const char *p, size_t n)
{
	char line[256];
	size_t i, k, len, h;
	int how;

	for (i = 0; i < n; i++) {
		CHECK(p[i] != '\r' || (i + 1 < n && p[i + 1] == '\n'),
		    "a bare CR is sent: %s", show(p, n));
		CHECK(p[i] != '\n' || (i > 0 && p[i - 1] == '\r'),
		    "a bare LF is sent: %s", show(p, n));
	}
	for (how = NUL_KEPT; how < NNULS; how++) {
		k = without_nuls(line, p, n, how);
		CHECK(k >= 5 && memcmp(line + k - 5, "\r\n.\r\n", 5) == 0,
		    "no end of data: %s", show(p, n));
		for (i = 2; i < k - 3; i++)
			for (h = 0; line[i] == '.' && h < NHOPS; h++) {
				len = strlen(hops[h].end);
				len += len == hops[h].dot + 1;	/* the NUL */
				CHECK(i < hops[h].dot ||
				    i - hops[h].dot + len > k ||
				    memcmp(line + i - hops[h].dot, hops[h].end,
				    len) != 0, "%s ends early for a next hop that"
				    " accepts %s (NULs: %d)", show(p, n),
				    show(hops[h].end, len), how);
			}
		if (memchr(p, '\0', n) == NULL)
			break;
	}
}

/* Replay the spool, read in pieces, and compare the output with want. */
static void
check_replay(struct session *s, size_t cut, size_t step, const struct text *want)
{
	struct buf *out = &s->server.peer.out;
	struct str header = s->replay.header;

	read_cut = cut;
	read_max = step;
	s->replay = (struct replay){ .header = header, .at_bol = 1 };
	CHECK(str_set(&s->replay.header, HEADER, sizeof HEADER - 1) == 0 &&
	    place_header(s) == 0, "memory");
	out->r = out->w = 0;
	while (!s->replay.dot_queued) {
		s->io_budget = 2;
		CHECK(replay_next(s) || s->io_budget < 2, "no room");
	}
	if (step == NEVER && cut == 0)
		check_hops(buf_head(out), buf_len(out));
	CHECK(buf_len(out) == want->n && memcmp(buf_head(out), want->p,
	    want->n) == 0, "%s is sent, not %s", show(buf_head(out),
	    buf_len(out)), show(want->p, want->n));
	runs++;
}

/* Check a body of n bytes, as DATA or as BDAT. */
static void
check_body(struct session *s, const char *body, size_t n, int bdat)
{
	static struct text want, with_header, sent;
	char p[64];
	size_t i, size, taken;

	memcpy(p, body, n);
	size = taken = n;
	if (!bdat) {
		memcpy(p + n, "\r\n.\r\n", 5);
		n += 5;
		CHECK(ref_end(p, n, &size, &taken), "no end");
	}
	want.n = with_header.n = sent.n = 0;
	ref_body(&want, p, size, !bdat);
	ref_add_header(&with_header, want.p, want.n, HEADER);
	for (i = 0; i < with_header.n; i++) {
		if (with_header.p[i] == '.' &&
		    (i == 0 || with_header.p[i - 1] == '\n'))
			text_puts(&sent, ".");
		text_add(&sent, with_header.p + i, 1);
	}
	text_puts(&sent, ".\r\n");

	s->msg.in_bdat = bdat;
	check_filter(s, p, n, 0, 1, &want, !bdat, taken);
	for (i = 1; i < taken; i++)
		check_filter(s, p, n, i, NEVER, &want, !bdat, taken);
	check_filter(s, p, n, 0, NEVER, &want, !bdat, taken);

	check_replay(s, 0, NEVER, &sent);
	if (memchr(want.p, '.', want.n) == NULL)
		return;
	check_replay(s, 0, 1, &sent);
	for (i = 1; i < want.n; i++)
		check_replay(s, scan_line_len + i, NEVER, &sent);
}

/* Check all strings of this length, with text before and after them. */
static void
all(struct session *s, size_t before, size_t length, size_t after)
{
	static const char alphabet[] = { 'x', '\r', '\n', '.', '\0' };
	char body[64];
	unsigned char digit[16] = { 0 };
	size_t i;

	memset(body, 'x', sizeof body);
	for (;;) {
		for (i = 0; i < length; i++)
			body[before + i] = alphabet[digit[i]];
		check_body(s, body, before + length + after, 0);
		check_body(s, body, before + length + after, 1);
		strings++;
		for (i = 0; i < length && ++digit[i] == sizeof alphabet; i++)
			digit[i] = 0;
		if (i == length)
			return;
	}
}

int
main(int argc, char **argv)
{
	static struct conf conf;
	struct session *s;
	size_t longest = depth(argc, argv, 8), length, before;

	s = new_session(&conf);
	s->msg.spool.fd = -1;
	CHECK(buf_ready(&s->server.peer.out, 1), "memory");
	for (length = 0; length <= longest; length++)
		all(s, 0, length, 0);
	/* line_end() examines eight bytes at once. */
	for (length = 0; length <= longest - 2; length++)
		for (before = 1; before <= 9; before++)
			all(s, before, length, before % 3 * 4);
	printf("body: %llu strings, %llu runs\n", strings, runs);
	return 0;
}

#include "../fuzz/fuzz.h"
