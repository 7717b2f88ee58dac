/*
 * This file runs a whole dialogue twice: with the daemon's own steps, and with
 * a slow and obvious model of what the manual page says.  Both write down each
 * line that the next hop receives (`> line'), each reply that the client
 * receives (`< code') and each message in the spool (`M bytes').  The two texts
 * must be equal.
 *
 * The next hop's reply depends on the line.  It is 550 if the line contains a
 * `!', 334 for AUTH, 221 for QUIT, and 250 for all others.  After a 334 it is
 * 334 if the line contains a `+', and 235 otherwise.  clamd finds a virus in
 * every message, and the daemon drops it.
 *
 * Byte 0 of the input: 1 single bytes, 2 the next hop offers CHUNKING, 4 it
 * offers SIZE 600, 8 MAIL and RCPT have been accepted, 16 EHLO has been
 * accepted.
 */

#include <strings.h>

static const char greeting[] =
    "EHLO x\r\n", mail[] = "MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\n";

/* Returns the next hop's reply to a line.  auth: the line follows a 334. */
static const char *
hop_reply(const char *line, size_t n, int auth, int flags)
{
	if (memchr(line, '!', n) != NULL)
		return auth ? "535 no\r\n" : "550-no\r\n550 no\r\n";
	if (auth)
		return memchr(line, '+', n) ? "334 \r\n" : "235 in\r\n";
	if (n >= 4 && strncasecmp(line, "AUTH", 4) == 0)
		return "334 go\r\n";
	if (n >= 4 && strncasecmp(line, "QUIT", 4) == 0)
		return "221 bye\r\n";
	if (n >= 4 && strncasecmp(line, "EHLO", 4) == 0)
		return (flags & 6) == 6 ?
		    "250-x\r\n250-SIZE 600\r\n250 CHUNKING\r\n" :
		    flags & 4 ? "250-x\r\n250 SIZE 600\r\n" :
		    flags & 2 ? "250-x\r\n250 CHUNKING\r\n" : "250 x\r\n";
	return "250 ok\r\n";
}

/*
 * The model.
 */

struct model {
	struct text out;
	int	 flags, ehlo;
	int	 mail, rcpts, bdat, raw, closed, auth, refusals;
	const struct stream *in;	/* where its pieces end */
	struct text from, message;
};

static void
expect_reply(struct model *m, const char *code)
{
	text_add(&m->out, "< ", 2);
	text_add(&m->out, code, 3);
	text_add(&m->out, "\n", 1);
}

/* The daemon refuses a command.  The twentieth refusal ends the session. */
static void
expect_refusal(struct model *m, const char *code)
{
	if (++m->refusals == 20) {
		expect_reply(m, "421");
		m->closed = 1;
	} else
		expect_reply(m, code);
}

static void
model_reset(struct model *m)
{
	m->mail = m->rcpts = m->bdat = 0;
	m->from.n = m->message.n = 0;
}

/* One line goes to the next hop.  Returns 1 if the reply is 2xx, else 0. */
static int
expect_line(struct model *m, const char *line, size_t n)
{
	const char *r = hop_reply(line, n, m->auth, m->flags);

	text_add(&m->out, "> ", 2);
	text_add(&m->out, line, n);
	text_add(&m->out, "\n", 1);
	expect_reply(m, r);
	m->auth = memcmp(r, "334", 3) == 0;
	return *r == '2';
}

/* The daemon ends the transaction: RSET to the next hop, code to the client. */
static void
expect_reset(struct model *m, const char *code)
{
	text_puts(&m->out, "> RSET\n");
	expect_reply(m, code);
	model_reset(m);
}

static void
message(struct model *m, const char *p, size_t n)
{
	char head[64];

	if (m->ehlo && (m->flags & 4) && n > 600) {
		expect_reset(m, "552");
		return;
	}
	snprintf(head, sizeof head, "M %zu ", n);
	text_puts(&m->out, head);
	text_add(&m->out, p, n);
	text_add(&m->out, "\n", 1);
	expect_reset(m, "250");
}

static int
verb(const char *line, const char *name)
{
	size_t n = strlen(name);

	return strncasecmp(line, name, n) == 0 &&
	    (line[n] == '\0' || line[n] == ' ' || line[n] == '\t');
}

static const char *
blanks(const char *p)
{
	while (*p == ' ' || *p == '\t')
		p++;
	return p;
}

static const char *
word_end(const char *p)
{
	while (*p != '\0' && *p != ' ' && *p != '\t')
		p++;
	return p;
}

/* Returns the end of a path `<...>', where p is after the `<'.  A > in quotes
 * or after a backslash is part of the path, if each quote has its pair. */
static const char *
path_end(const char *p)
{
	const char *q;
	int in_quotes = 0;

	for (q = p; *q != '\0'; q++) {
		if (*q == '>' && !in_quotes)
			return q;
		if (*q == '"')
			in_quotes ^= 1;
		if (*q == '\\' && q[1] != '\0')
			q++;
	}
	for (q = p; *q != '\0' && *q != '>'; q++)
		;
	return q;
}

/* Returns the code with which the daemon refuses MAIL, or NULL.  from: set to
 * the address in MAIL. */
static const char *
mail_refusal(const struct model *m, const char *line, struct text *from)
{
	const char *p = strchr(line, ':'), *end;
	int limited = m->ehlo && (m->flags & 4);
	long long size;

	from->n = 0;
	text_add(from, "", 0);
	if (p == NULL)
		return NULL;
	p = blanks(p + 1);
	if (*p == '<') {
		end = path_end(++p);
		text_add(from, p, end - p);
		p = *end == '>' ? end + 1 : end;
	} else {
		end = word_end(p);
		text_add(from, p, end - p);
		p = end;
	}
	for (p = blanks(p); *p != '\0'; p = blanks(end)) {
		end = word_end(p);
		if (limited && strncasecmp(p, "SIZE=", 5) == 0 &&
		    ref_number(p + 5, &size) != -1 && size > 600)
			return "552";
		if (strncasecmp(p, "BODY=BINARYMIME", 15) == 0)
			return "501";
	}
	return NULL;
}

static int
known(const char *line)
{
	static const char *const names[] = { "EHLO", "HELO", "MAIL", "RCPT",
	    "DATA", "BDAT", "RSET", "NOOP", "QUIT", "AUTH", "VRFY", "EXPN",
	    "HELP", "ETRN", "XFORWARD", "XCLIENT", "STARTTLS", NULL };
	int i;

	for (i = 0; names[i] != NULL; i++)
		if (verb(line, names[i]))
			return 1;
	return 0;
}

/* Returns 1 if the command is not allowed between two chunks. */
static int
not_in_chunks(const char *line)
{
	return verb(line, "MAIL") || verb(line, "RCPT") || verb(line, "DATA") ||
	    verb(line, "AUTH") || verb(line, "ETRN") || verb(line, "XFORWARD");
}

/* Returns how many bytes of a message are in the spool while more may follow.
 * Of raw chunks all bytes are.  Otherwise the daemon holds CRs at the end, or
 * NULs at the start of the last line, because the bytes after them decide
 * whether they stay. */
static size_t
stored(const struct model *m)
{
	struct text body = { NULL, 0, 0 };
	const char *p = m->message.p;
	size_t n = m->message.n, k, size;

	if (m->raw || n == 0)
		return n;
	if (p[n - 1] == '\r')
		while (n > 0 && p[n - 1] == '\r')
			n--;
	else {
		for (k = n; k > 0 && p[k - 1] == '\0'; k--)
			;
		if (k == 0 || p[k - 1] == '\n')
			n = k;
	}
	ref_body(&body, p, n, 0);
	size = body.n;
	if (n > 0 && p[n - 1] != '\n')
		size -= 2;		/* the line end has not arrived yet */
	text_free(&body);
	return size;
}

/* Handle BDAT; n bytes at p follow the command.  Returns how many of them the
 * chunk took, or -1 when it is not complete. */
static long
model_bdat(struct model *m, const char *line, const char *p, size_t n)
{
	struct text body = { NULL, 0, 0 };
	const char *a = blanks(line + 4), *end = word_end(a), *b = blanks(end);
	int last = strcasecmp(b, "LAST") == 0, limited;
	long long size;

	if (ref_number(a, &size) != 1 || (*b != '\0' && !last)) {
		expect_reply(m, "501");
		m->closed = 1;
		return 0;
	}
	if ((unsigned long long)size > n)
		return -1;
	if (!m->bdat) {
		m->bdat = 1;
		m->raw = m->ehlo && (m->flags & 2);
	}
	if (!m->mail || m->rcpts == 0) {
		expect_refusal(m, "503");
		m->bdat = 0;
		return size;
	}
	limited = m->ehlo && (m->flags & 4);
	if (limited && stored(m) + size > 600) {
		expect_reset(m, "552");
		return size;
	}
	text_add(&m->message, p, size);
	if (limited && stored(m) > 600)		/* bare LFs became CRLF */
		expect_reset(m, "552");
	else if (!last)
		expect_reply(m, "250");
	else if (m->raw)
		message(m, m->message.p, m->message.n);
	else {
		ref_body(&body, m->message.p, m->message.n, 0);
		message(m, body.p, body.n);
		text_free(&body);
	}
	return size;
}

/* Returns 1 if the piece with the line before p contains more bytes. */
static int
comes_with_more(const struct model *m, const char *p, size_t n)
{
	size_t i, at = p - m->in->p;

	if (n == 0)
		return 0;
	for (i = 0; i < m->in->ncut; i++)
		if (m->in->cut[i] == at)
			return 0;
	return 1;
}

/* Returns 1 if the n bytes at the start of a line are not SMTP. */
static int
not_smtp_line(const char *p, size_t n)
{
	static const char *const words[] = { "CONNECT", "GET", "POST", NULL };
	size_t i, k;

	if (n == 0 || *p == '\n' || (*p == '\r' && (n == 1 || p[1] == '\n')))
		return 0;
	if (strchr("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz \t",
	    *p) == NULL || *p == '\0')
		return 1;
	for (i = 0; words[i] != NULL; i++) {
		k = strlen(words[i]);
		if (n > k && strncasecmp(p, words[i], k) == 0 &&
		    (p[k] == ' ' || p[k] == '\t' || p[k] == '\r' || p[k] == '\n'))
			return 1;
	}
	return 0;
}

/* Handle one command, without its line end; n bytes at p follow it.  Returns
 * how many of them it took, or -1 when they are not complete. */
static long
model_command(struct model *m, const char *line, size_t len, const char *p,
    size_t n)
{
	struct text body = { NULL, 0, 0 }, from = { NULL, 0, 0 };
	size_t end, taken;
	const char *code;

	if (!known(line))
		expect_refusal(m, "500");
	else if (verb(line, "DATA") && comes_with_more(m, p, n)) {
		expect_reply(m, "554");
		m->closed = 1;
	} else if (m->bdat && not_in_chunks(line))
		expect_refusal(m, "503");
	else if (verb(line, "STARTTLS"))
		expect_refusal(m, "502");
	else if (verb(line, "XCLIENT"))
		expect_refusal(m, "554");
	else if (verb(line, "XFORWARD") && m->mail)
		expect_refusal(m, "503");
	else if (verb(line, "BDAT"))
		return model_bdat(m, line, p, n);
	else if (verb(line, "DATA")) {
		if (*blanks(line + 4) != '\0')
			expect_refusal(m, "501");
		else if (!m->mail || m->rcpts == 0)
			expect_refusal(m, "503");
		else {
			expect_reply(m, "354");
			if (!ref_end(p, n, &end, &taken))
				return -1;
			ref_body(&body, p, end, 1);
			message(m, body.p, body.n);
			text_free(&body);
			return taken;
		}
	} else if (verb(line, "MAIL")) {
		if ((code = mail_refusal(m, line, &from)) != NULL) {
			if (strcmp(code, "501") == 0)
				expect_refusal(m, code);
			else
				expect_reply(m, code);
		}
		else if (expect_line(m, line, len)) {
			model_reset(m);
			m->mail = 1;
			if (from.n == 0)
				text_add(&m->from, "<>", 2);
			else
				text_add(&m->from, from.p, from.n);
		}
	} else if (expect_line(m, line, len)) {
		if (verb(line, "RCPT"))
			m->rcpts++;
		if (verb(line, "RSET") || verb(line, "HELO") ||
		    verb(line, "EHLO"))
			model_reset(m);
		if (verb(line, "EHLO"))
			m->ehlo = 1;
		if (verb(line, "HELO"))
			m->ehlo = 0;
	}
	m->closed |= verb(line, "QUIT");	/* with any reply */
	text_free(&from);
	return 0;
}

/* Handle everything that the client sends. */
static void
model_run(struct model *m, const char *p, size_t n)
{
	char line[LINESZ + 1];
	size_t i, len;
	long took;

	for (; !m->closed; p += took, n -= took) {
		if (!m->auth && not_smtp_line(p, n)) {
			expect_reply(m, "554");
			m->closed = 1;
			return;
		}
		for (i = 0; i < n && p[i] != '\n'; i++)
			;
		if (i == n)
			return;
		len = i > 0 && p[i - 1] == '\r' ? i - 1 : i;
		if (len > LINESZ) {
			expect_refusal(m, "500");
			m->closed |= m->auth;
			took = i + 1;
			continue;
		}
		memcpy(line, p, len);
		line[len] = '\0';
		p += i + 1;
		n -= i + 1;
		took = 0;
		if (memchr(line, '\0', len) || memchr(line, '\r', len)) {
			expect_refusal(m, "501");
			m->closed |= m->auth;
		} else if (m->auth)
			expect_line(m, line, len);
		else if ((took = model_command(m, line, len, p, n)) == -1)
			return;
	}
}

/*
 * The daemon.
 */

/* Move the daemon's output for both sides to out, and feed it the next hop's
 * reply. */
static void
exchange(struct session *s, struct text *out, int flags)
{
	struct buf *b = &s->server.peer.out;
	const char *p = buf_head(b), *end, *r;
	size_t n = buf_len(b);
	int auth = s->state == S_REPLY && s->server.peer.err == 99;

	s->server.peer.err = 0;
	if (n > 0) {
		CHECK(n >= 2 && memcmp(p + n - 2, "\r\n", 2) == 0 &&
		    memchr(p, '\n', n) == p + n - 1 &&
		    memchr(p, '\r', n) == p + n - 2 &&
		    memchr(p, '\0', n) == NULL,
		    "the output to the next hop is not one line");
		text_add(out, "> ", 2);
		text_add(out, p, n - 2);
		text_add(out, "\n", 1);
		CHECK(buf_len(&s->server.peer.in) == 0,
		    "a command is sent before the last reply is read");
		r = hop_reply(p, n - 2, auth, flags);
		buf_free(b);
		feed(&s->server.peer.in, r, strlen(r));
	}
	b = &s->client.out;
	for (p = buf_head(b), n = buf_len(b); n > 0; n -= end + 1 - p, p = end + 1) {
		end = memchr(p, '\n', n);
		CHECK(end != NULL && end - p >= 5 && end[-1] == '\r',
		    "not a reply line to the client");
		if (p[3] == '-')
			continue;
		text_add(out, "< ", 2);
		text_add(out, p, 3);
		text_add(out, "\n", 1);
	}
	buf_free(b);
}

/* Act as clamd: write down the message, and report a virus. */
static void
scan(struct session *s, struct text *out)
{
	char head[64], *p = malloc(s->msg.size + 1);

	CHECK(p != NULL, "memory");
	CHECK(spool_read(&s->msg.spool, p, s->msg.size + 1,
	    scan_line_len) == s->msg.size,
	    "the spool differs in length from msg.size");
	snprintf(head, sizeof head, "M %zu ", (size_t)s->msg.size);
	text_puts(out, head);
	text_add(out, p, s->msg.size);
	text_add(out, "\n", 1);
	free(p);
	clamd_cancel(s);
	s->result.verdict = VIRUS;
	snprintf(s->result.text, sizeof s->result.text, "X");
}

static void
run(struct session *s, struct text *out, int flags)
{
	int turns, auth;

	for (turns = 0; s->state != S_LINGER && s->state != S_DEAD; turns++) {
		CHECK(turns < 200000, "the daemon loops without end");
		if (s->state == S_SCAN)
			scan(s, out);
		auth = s->state == S_AUTH;
		if (!states[s->state].step(s))
			break;
		if (auth && s->state == S_REPLY)
			s->server.peer.err = 99;	/* exchange() clears it */
		exchange(s, out, flags);
	}
	exchange(s, out, flags);
}

static void
dialogue(const uint8_t *data, size_t size)
{
	static struct conf conf;
	static struct stream in;
	struct model m;
	struct text out = { NULL, 0, 0 };
	struct session *s;
	size_t i, lines, sent = 0;
	int flags;

	if (size < 1)
		return;
	flags = data[0];
	stream_read(&in, data + 1, size - 1, flags & 1);
	for (i = lines = 0; i < in.n; i++)
		lines += in.p[i] == '\n';
	if (lines > 200)
		return;			/* only slow */
	s = new_session(&conf);
	s->state = S_COMMAND;
	text_add(&out, "", 0);
	memset(&m, 0, sizeof m);
	m.flags = flags;
	m.in = &in;
	text_add(&m.out, "", 0);
	text_add(&m.message, "", 0);
	text_add(&m.from, "", 0);
	if (flags & 16) {
		feed(&s->client.in, greeting, sizeof greeting - 1);
		model_run(&m, greeting, sizeof greeting - 1);
	}
	if (flags & 8) {
		feed(&s->client.in, mail, sizeof mail - 1);
		model_run(&m, mail, sizeof mail - 1);
	}
	run(s, &out, flags);
	for (i = 0; i < in.ncut && s->state != S_LINGER && s->state != S_DEAD;
	    i++) {
		if (!feed(&s->client.in, in.p + sent, in.cut[i] - sent))
			CHECK(0, "the daemon waits although its buffer is full");
		sent = in.cut[i];
		run(s, &out, flags);
	}
	model_run(&m, in.p, in.n);
	same("dialogue", out.p, out.n, m.out.p, m.out.n);
	if (!m.closed && m.mail)
		same("sender", s->env.from.s, s->env.from.len, m.from.p, m.from.n);
	CHECK(m.closed == (s->state == S_LINGER), "reference: closed %d",
	    m.closed);
	if (!m.closed)
		s->client.eof = 1;
	run(s, &out, flags);
	session_free(s);
	text_free(&out);
	text_free(&m.out);
	text_free(&m.message);
	text_free(&m.from);
}
