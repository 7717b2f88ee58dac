/*
 * Target body: the body automaton and the replay.  Byte 0 of the input: 1
 * single bytes, 2 BDAT (without dot-stuffing and end of data), 4 a size limit
 * of 64 bytes, 8 the header is added on top, 16 no header is added.  The rest
 * is the stream.
 */

#include "../smtp.c"
#include "fuzz.h"
#include "bodyref.h"

static int sink = -1, hop = -1, end_of_client = -1, client = -1;

static void
sockets(void)
{
	int pair[2];

	if (sink != -1)
		return;
	CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair) == 0,
	    "socketpair");
	sink = pair[0];
	hop = pair[1];
	CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair) == 0,
	    "socketpair");
	end_of_client = pair[0];
	client = pair[1];
}

static void
take(struct text *out)
{
	static char piece[65536];
	ssize_t n;

	while ((n = read(sink, piece, sizeof piece)) > 0)
		text_add(out, piece, n);
}

static void
spool_text(struct session *s, struct text *t)
{
	char *p = malloc(s->msg.size + 1);

	CHECK(p != NULL, "memory");
	CHECK(spool_read(&s->msg.spool, p, s->msg.size + 1,
	    scan_line_len) == s->msg.size,
	    "the spool differs in length from msg.size");
	text_add(t, p, s->msg.size);
	free(p);
}

/* Returns 1 if some server could take this line of the output, which is
 * without its CRLF, for the end of data.  The line is then a dot as it is,
 * with its NULs dropped, or up to its first NUL. */
static int
is_dot(const char *p, size_t n)
{
	size_t i, all = 0, dots = 0;

	if (n >= 1 && p[0] == '.' && (n == 1 || p[1] == '\0'))
		return 1;
	for (i = 0; i < n; i++) {
		all += p[i] != '\0';
		dots += p[i] == '.';
	}
	return all == 1 && dots == 1;
}

/* Compare what a strict server stores of the output with want, and see that no
 * server can find a second end of data in it. */
static void
check_output(const struct text *out, const struct text *want)
{
	struct text got = { NULL, 0, 0 };
	size_t i, k;

	text_add(&got, "", 0);
	for (i = 0; i < out->n; i++) {
		if (out->p[i] == '\r')
			CHECK(i + 1 < out->n && out->p[i + 1] == '\n',
			    "a bare CR is sent, at %zu", i);
		if (out->p[i] == '\n')
			CHECK(i > 0 && out->p[i - 1] == '\r',
			    "a bare LF is sent, at %zu", i);
	}
	CHECK(out->n >= 3 && memcmp(out->p + out->n - 3, ".\r\n", 3) == 0,
	    "no final dot");
	CHECK(out->n == 3 || out->p[out->n - 4] == '\n',
	    "the final dot is not on a line of its own");
	for (i = 0; i < out->n - 3; i = k + 1) {
		for (k = i; out->p[k] != '\n'; k++)
			;
		CHECK(!is_dot(out->p + i, k - 1 - i), "a second end of data at %zu", i);
		if (out->p[i] == '.')
			text_add(&got, out->p + i + 1, k - i);
		else
			text_add(&got, out->p + i, k + 1 - i);
	}
	same("replay", got.p, got.n, want->p, want->n);
	text_free(&got);
}

static void
replay(struct session *s, const struct text *spooled, int flags)
{
	struct text out = { NULL, 0, 0 }, want = { NULL, 0, 0 };
	const char *header = flags & 16 ? "" : flags & 8 ? "Received: x\r\n" :
	    "X-V: c\r\n";
	int turns;

	ref_add_header(&want, spooled->p, spooled->n, header);

	/* The state after forward() and st_data(). */
	CHECK(str_set(&s->replay.header, header, strlen(header)) == 0 &&
	    place_header(s) == 0, "memory");
	s->replay.header_queued = s->replay.dot_queued = 0;
	s->replay.off = 0;
	s->replay.at_bol = 1;
	s->server.verb = verb_find("DATA");
	s->result.verdict = CLEAN;
	s->msg.dot_at = now;
	enter(s, S_REPLAY);
	for (turns = 0; s->state == S_REPLAY; turns++) {
		CHECK(turns < 100000, "the replay does not end");
		s->io_budget = 4;
		do {
			while (s->state == S_REPLAY && st_replay(s))
				;
		} while (s->state == S_REPLAY && flush(s));
		take(&out);
	}
	CHECK(s->state == S_FINAL, "the replay ends in state %d", s->state);
	check_output(&out, &want);
	text_free(&out);
	text_free(&want);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct conf conf;
	struct session *s;
	static struct stream in;
	struct text want = { NULL, 0, 0 }, got = { NULL, 0, 0 };
	char *piece;
	size_t i, at = 0, body = 0, taken = 0;
	int flags, end = 0, ended;

	if (size < 1)
		return 0;
	flags = data[0];
	sockets();
	stream_read(&in, data + 1, size - 1, flags & 1);
	s = new_session(&conf);
	close(s->server.peer.fd);
	close(s->client.fd);
	s->server.peer.fd = hop;
	s->client.fd = client;
	s->msg.in_bdat = (flags & 2) != 0;
	s->server.size = flags & 4 ? 64 : 0;
	s->env.nrcpt = 1;
	message_begin(s);
	CHECK(s->result.outcome == OUT_NONE, "no spool: %s", strerror(errno));

	/* Each piece ends at the end of its memory. */
	for (i = 0; i < in.ncut && !end; i++) {
		piece = malloc(in.cut[i] - at + 1);
		CHECK(piece != NULL, "memory");
		piece++;
		memcpy(piece, in.p + at, in.cut[i] - at);
		at += body_filter(s, piece, in.cut[i] - at, &end);
		CHECK(end || at == in.cut[i], "bytes were left over");
		spool_flush(s);
		free(piece - 1);
	}

	ended = 1;
	if (s->msg.in_bdat)
		body = taken = in.n;
	else
		ended = ref_end(in.p, in.n, &body, &taken);
	CHECK(end == (ended && !s->msg.in_bdat), "end of data: reference says %d", ended);
	if (ended) {
		CHECK(at == taken, "%zu bytes taken, reference: %zu", at, taken);
		body_end(s);
		ref_body(&want, in.p, body, !s->msg.in_bdat);
		if (s->server.size > 0 && want.n > 64) {
			CHECK(s->result.outcome != OUT_NONE, "the size limit is not enforced");
			CHECK(s->msg.size <= 64, "more bytes are stored than the limit allows");
		} else {
			CHECK(s->result.outcome == OUT_NONE, "an error: %s", s->result.reply.s);
			spool_text(s, &got);
			same("spool", got.p, got.n, want.p, want.n);
			at = ref_header(want.p, want.n, ref_top(want.p, want.n));
			CHECK((size_t)s->msg.header_end == at,
			    "header ends at %zu, reference %zu",
			    (size_t)s->msg.header_end, at);
			replay(s, &want, flags);
		}
	}
	s->client.fd = s->server.peer.fd = -1;
	str_free(&s->replay.header);
	session_free(s);
	text_free(&want);
	text_free(&got);
	return 0;
}

#include "fuzz.h"
