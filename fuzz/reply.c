/*
 * Target reply: the reply reader and the EHLO filter.  Byte 0 of the input:
 * 1 single bytes, 2 EHLO, 4 HELO, 8 MaxScanSize 5000, 16 the next hop closes at
 * the end.  The rest is what the next hop sends.
 */

#include "../smtp.c"
#include "fuzz.h"

#include <strings.h>

/* Returns the number of bytes of the text character at p, or 0 if there is a
 * control character or invalid UTF-8 (RFC 3629). */
static size_t
ref_char(const char *p, size_t n)
{
	static const long first[] = { 0, 0xA0, 0x800, 0x10000 };
	const unsigned char *u = (const unsigned char *)p;
	size_t i, more = u[0] < 0x80 ? 0 : u[0] < 0xC0 ? 4 : u[0] < 0xE0 ? 1 :
	    u[0] < 0xF0 ? 2 : u[0] < 0xF8 ? 3 : 4;
	long c = more == 0 ? u[0] : u[0] & (0x3F >> more);

	if (more == 0)
		return c >= ' ' && c != 127;
	if (more == 4 || n < more + 1)
		return 0;
	for (i = 1; i <= more; i++)
		if (u[i] < 0x80 || u[i] > 0xBF)
			return 0;
		else
			c = c * 64 + (u[i] & 0x3F);
	return c >= first[more] && c <= 0x10FFFF &&
	    (c < 0xD800 || c > 0xDFFF) ? more + 1 : 0;
}

/* Append one line of a reply as the client may receive it. */
static void
ref_line(struct text *to, const char *p, size_t n)
{
	size_t len;

	if (n > 0 && p[n - 1] == '\r')
		n--;
	for (; n > 0; p += len, n -= len)
		if ((len = ref_char(p, n)) > 0)
			text_add(to, p, len);
		else {
			text_add(to, " ", 1);
			len = 1;
		}
	text_add(to, "\r\n", 2);
}

/* Returns 1 if p is a line of a reply: a code, and then a blank, a hyphen or
 * the end of the line. */
static int
ref_is_line(const char *p, size_t n)
{
	if (n < 3 || p[0] < '2' || p[0] > '5' || p[1] < '0' || p[1] > '9' ||
	    p[2] < '0' || p[2] > '9')
		return 0;
	return n == 3 || p[3] == ' ' || p[3] == '-' || p[3] == '\r';
}

/* Returns what server_reply() must return for p.  For REPLY it sets the length and
 * the code. */
static enum got
ref_reply(const char *p, size_t len, size_t *n, int *code)
{
	size_t i = 0, k;

	for (;; i = k + 1) {
		for (k = i; k < len && p[k] != '\n'; k++)
			;
		if (k == len)
			return WAIT;
		if (!ref_is_line(p + i, k - i) || memcmp(p, p + i, 3) != 0)
			return LOST;
		if (k - i < 4 || p[i + 3] != '-') {
			*n = k + 1;
			*code = (p[0] - '0') * 100 + (p[1] - '0') * 10 +
			    p[2] - '0';
			return REPLY;
		}
	}
}

static void
ref_relay(struct text *to, const char *p, size_t n)
{
	size_t i, k;

	for (i = 0; i < n; i = k + 1) {
		for (k = i; p[k] != '\n'; k++)
			;
		ref_line(to, p + i, k - i);
	}
}

static int
ref_word(const char *p, size_t n, const char *word)
{
	return strlen(word) == n && strncasecmp(p, word, n) == 0;
}

struct offer {
	long long size;
	int	 chunking, xclient;
};

static void
ref_xclient(struct offer *o, char *p)
{
	for (p = strtok(p, " "); p != NULL; p = strtok(NULL, " "))
		if (strcasecmp(p, "NAME") == 0)
			o->xclient |= X_NAME;
		else if (strcasecmp(p, "ADDR") == 0)
			o->xclient |= X_ADDR;
		else if (strcasecmp(p, "PORT") == 0)
			o->xclient |= X_PORT;
}

/* Handle a keyword with its arguments: append it if the client may see it, and
 * note what the daemon keeps. */
static void
ref_keyword(struct text *to, struct offer *o, char *p, long long max)
{
	static const char *const known[] = { "SIZE", "8BITMIME", "DSN",
	    "SMTPUTF8", "ENHANCEDSTATUSCODES", "AUTH", "ETRN", "VRFY", "EXPN",
	    "HELP", "XFORWARD", "DELIVERBY", NULL };
	const char *const *k;
	char line[64];
	size_t w = strcspn(p, " =");
	long long limit, number;
	int size = ref_word(p, w, "SIZE"), keep = 0;

	if (size && p[w] == ' ' && ref_number(p + w + 1, &number) != -1)
		o->size = number;
	o->chunking |= ref_word(p, w, "CHUNKING");
	if (ref_word(p, w, "XCLIENT"))
		ref_xclient(o, p + w);
	for (k = known; *k != NULL; k++)
		keep |= ref_word(p, w, *k) &&
		    (p[w] != '=' || strcmp(*k, "AUTH") == 0);
	limit = max > 0 && (o->size == 0 || max < o->size) ? max : o->size;
	if (keep && size && limit > 0) {
		snprintf(line, sizeof line, "250-SIZE %lld\r\n", limit);
		text_puts(to, line);
	} else if (keep) {
		text_puts(to, "250-");
		text_puts(to, p);
		text_puts(to, "\r\n");
	}
}

/* Append what the client receives of an EHLO reply, and note what the daemon
 * keeps. */
static void
ref_ehlo(struct text *to, struct offer *o, const char *p, size_t n, int esmtp,
    long long max)
{
	struct text line = { NULL, 0, 0 };
	size_t i, end;
	int first = 1;

	text_puts(to, "250-smtp.passthru\r\n");
	for (i = 0; i < n && esmtp; i = end + 1, first = 0) {
		for (end = i; p[end] != '\n'; end++)
			;
		if (first)
			continue;
		line.n = 0;
		ref_line(&line, p + i, end - i);
		line.p[line.n -= 2] = '\0';
		if (line.n >= 4)
			ref_keyword(to, o, line.p + 4, max);
	}
	if (esmtp)
		text_puts(to, "250-PIPELINING\r\n");
	if (esmtp && o->chunking)
		text_puts(to, "250-CHUNKING\r\n");
	for (i = to->n - 2; i > 0 && to->p[i - 1] != '\n'; i--)
		;
	to->p[i + 3] = ' ';
	text_free(&line);
}

/* Compare a complete reply, and what the daemon makes of it. */
static void
check_reply(struct session *s, const struct reply *r, const char *p, size_t n,
    int flags)
{
	struct text want = { NULL, 0, 0 };
	struct offer o = { 0, 0, 0 };
	/* The scan line counts against clamd's limit. */
	long long max = flags & 8 ? 5000 - (long long)scan_line_len : 0;

	same("reply", r->text, r->len, p, n);
	(void)first_line(r);
	if (flags & 6) {
		ehlo_filter(s, r, (flags & 2) != 0);
		ref_ehlo(&want, &o, p, n, (flags & 2) != 0, max);
		same("EHLO", s->server.ehlo.s, s->server.ehlo.len, want.p, want.n);
		CHECK(s->server.size == o.size && s->server.chunking == o.chunking &&
		    s->server.xclient == o.xclient, "size %lld/%lld chunking %d/%d "
		    "xclient %d/%d", (long long)s->server.size, o.size,
		    s->server.chunking, o.chunking, s->server.xclient, o.xclient);
		str_free(&s->server.ehlo);
		s->server.ehlo.len = 0;
	} else {
		ref_relay(&want, p, n);
		CHECK(client_ready(s), "no room in the client's buffer");
		relay(s, r);
		CHECK(!s->client.err, "cannot be relayed");
		same("relayed", buf_head(&s->client.out),
		    buf_len(&s->client.out), want.p, want.n);
		buf_free(&s->client.out);
	}
	text_free(&want);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct conf conf;
	static struct stream in;
	struct session *s;
	struct reply r;
	size_t i, at = 0, sent = 0, n = 0;
	int flags, code = 0, eof = 0, lost = 0;
	enum got got, want;

	if (size < 1)
		return 0;
	flags = data[0];
	stream_read(&in, data + 1, size - 1, flags & 1);
	s = new_session(&conf);
	conf.maxscansize = flags & 8 ? 5000 : 0;
	s->state = S_REPLY;
	for (i = 0; i < in.ncut && !lost; i++) {
		if (!feed(&s->server.peer.in, in.p + sent, in.cut[i] - sent))
			break;
		sent = in.cut[i];
		if (i + 1 == in.ncut && (flags & 16))
			s->server.peer.eof = eof = 1;
		do {
			got = server_reply(s, &r);
			want = ref_reply(in.p + at, sent - at, &n, &code);
			if (want == REPLY && n > REPLYSZ)
				want = LOST;
			if (want == WAIT && (sent - at > REPLYSZ || eof))
				want = LOST;
			CHECK(got == want, "server_reply: %d, reference: %d", got,
			    want);
			if (got == REPLY) {
				CHECK(r.code == code, "code %d", r.code);
				check_reply(s, &r, in.p + at, n, flags);
				reply_eat(s, &r);
				at += n;
				CHECK(buf_len(&s->server.peer.in) == sent - at,
				    "the reply was not removed completely");
			}
			lost = got == -1;
		} while (got == 1);
	}
	session_free(s);
	return 0;
}

#include "fuzz.h"
