/*
 * A session, from top to bottom.  The states are in the order in which they
 * happen:
 *
 *	PROXY	    a load balancer may name the client
 *	CONNECT	    to the next hop, as soon as the client has connected
 *	GREETING    of the next hop, relayed with another host name
 *	COMMAND	    the next command of the client
 *	REPLY	    to that command, read whole and relayed whole
 *	AUTH	    a line of the client after 334, relayed unread
 *	BODY	    DATA: the message goes to the spool, up to the end of data
 *	CHUNK	    BDAT: a chunk of the message goes to the spool
 *	SCAN	    clamd scans the message
 *	QUARANTINE  a child copies an infected message
 *	DATA	    the next hop is asked to take the message
 *	REPLAY	    header and message go to the next hop
 *	FINAL	    the reply of the next hop to the message
 *	RESET	    in place of the last three, for a message that is rejected
 *	LINGER	    half-close and drain, or a RST could discard the last reply
 *
 * At most one command is outstanding at the next hop, so a reply always belongs
 * to that command.
 *
 * Promise 4: no byte of a message reaches the next hop unless clamd has called
 * the message OK or the settings say so.  Only forward() enters S_DATA, and
 * only judge() and virus_found() call forward().
 */

#include <ctype.h>
#include <endian.h>
#include <errno.h>
#include <limits.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/uio.h>
#include <unistd.h>

#include "clamsmtpd.h"

/* SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST, by the kernel's number. */
#define ORIGINAL_DST	80

#define OUR_NAME	"smtp.passthru"

#define PROXYSZ		2048		/* bytes of a PROXY header */
#define TAIL		(BUFSZ / 4)	/* bytes of a message that are copied */

#define FIRST_ID	0x100000	/* of a session, in the log; six digits */
#define ACTIVE_TIME	100		/* ms after a session ran it is active */
#define IDLE_POLL	10		/* ms between polls of the idle sessions */
#define MANY_IDLE	64		/* so few of them are polled in each pass */

/* All replies of our own. */
static const char
    r_bye[] =		"221 2.0.0 Bye",
    r_ready[] =		"354 Start mail input; end with <CRLF>.<CRLF>",
    r_chunk[] =		"250 2.0.0 %llu octets received",
    r_virus_drop[] =	"250 2.0.0 Virus Detected; Discarded Email",
    r_virus_bounce[] =	"550 5.7.1 Virus Detected; Content Rejected (%s)",
    r_busy[] =		"421 4.3.2 Server busy, too many connections",
    r_stopping[] =	"421 4.3.2 Service shutting down",
    r_loop[] =		"421 4.4.6 Mail loop: this is a connection of our own",
    r_no_server[] =	"421 4.4.1 Local Error (next mail server: %s)",
    r_server_lost[] =	"421 4.4.2 Local Error (next mail server: %s)",
    r_server_lost_mail[] =	"451 4.4.2 Local Error (next mail server: %s)",
    r_idle[] =		"421 4.4.2 Timeout, closing connection",
    r_too_many[] =	"421 4.7.0 Too many refused commands, "
			    "closing connection",
    r_no_scan[] =	"451 4.3.0 Local Error (clamd: %s)",
    r_local[] =		"451 4.3.0 Local Error (%s: %s)",
    r_full[] =		"452 4.3.1 Local Error (%s: %s)",
    r_too_big[] =	"552 5.3.4 Message too big (limit %lld bytes)",
    r_not_scanned[] =	"552 5.3.4 Message too big "
			    "(%lld bytes: more than is scanned)",
    r_flood[] =		"554 5.6.0 Too many NULs or CRs in a row",
    r_long[] =		"500 5.5.2 Line too long",
    r_unknown[] =	"500 5.5.1 Command not recognized",
    r_control[] =	"501 5.5.2 Control character in command",
    r_no_args[] =	"501 5.5.4 DATA takes no parameters",
    r_bad_size[] =	"501 5.5.4 Syntax: BDAT size [LAST]",
    r_binary[] =	"501 5.5.4 BODY=BINARYMIME is not supported",
    r_no_tls[] =	"502 5.5.1 Command not implemented",
    r_sequence[] =	"503 5.5.1 Bad sequence of commands",
    r_no_rcpt[] =	"503 5.5.1 No accepted MAIL and RCPT before this",
    r_early_body[] =	"554 5.5.0 Input after DATA before the reply to it",
    r_not_smtp[] =	"554 5.5.1 Not an SMTP command, closing connection",
    r_xclient[] =	"554 5.7.0 Insufficient authorization";

/* Attributes of XCLIENT that we can send. */
enum { X_NAME = 1, X_ADDR = 2, X_PORT = 4 };

struct reply {
	const struct verb *verb;	/* the command, or NULL */
	int	 code, class;		/* 250 and 2 */
	const char *text;		/* in server.peer.in: all lines */
	size_t	 len;
};

/*
 * The verbs.  on_command gets a line, NUL-terminated and without its end, and
 * on_reply the next hop's reply.  Both return 0 when the text is to be passed
 * on, 1 when it is dealt with.
 */
struct verb {
	char	 name[9];
	int	(*on_command)(struct session *, char *line);
	int	(*on_reply)(struct session *, const struct reply *);
	int	 in_chunks;		/* may come between two BDATs */
	int	 unnamed;		/* may come before XCLIENT */
};

static const struct verb *verb_find(const char *line);

static int
verb_is(const struct verb *v, const char *name)
{
	return v != NULL && strcmp(v->name, name) == 0;
}

/* A state lasts for TimeOut, unless s->deadline is changed after this.  Returns
 * 1, as a step does. */
static int
enter(struct session *s, enum state state)
{
	s->state = state;
	s->deadline = now + s->conf->timeout;
	return 1;
}

/*
 * Output to the client and to the next hop.
 */

static void
log_dialogue(const struct session *s, const char *who, const char *p, size_t n)
{
	const char *nl, *end = p + n;

	if (log_level < LOG_DEBUG)
		return;
	for (; p < end; p = nl + 1) {
		if ((nl = memchr(p, '\n', end - p)) == NULL)
			nl = end;
		n = nl - p;
		slog(s, LOG_DEBUG, "%s %s", who,
		    printable(p, n > 0 && p[n - 1] == '\r' ? n - 1 : n));
	}
}

/* Returns 1 when client.out has room for a whole reply, else 0. */
static int
client_ready(struct session *s)
{
	return buf_ready(&s->client.out, RELAYSZ + NOTESZ);
}

/* Drop the client when memory runs out: to skip a reply would desynchronize
 * it. */
static void
client_nomem(struct session *s)
{
	s->client.err = s->client.eof = 1;
}

static void
client_put(struct session *s, const char *p, size_t n)
{
	if (!buf_ready(&s->client.out, n)) {
		client_nomem(s);
		return;
	}
	buf_put(&s->client.out, p, n);
	log_dialogue(s, "CLIENT >", p, n);
}

/* Promise 8: the arguments may contain text of a peer.  Returns the length. */
static size_t
format_line(char line[NOTESZ], const char *fmt, va_list ap)
{
	size_t len = vformat(line, NOTESZ - 2, fmt, ap);

	ascii_clean(line, len, " ", '?');
	line[len++] = '\r';
	line[len++] = '\n';
	return len;
}

static void __attribute__((format(printf, 2, 3)))
client_reply(struct session *s, const char *fmt, ...)
{
	char line[NOTESZ];
	va_list ap;

	va_start(ap, fmt);
	client_put(s, line, format_line(line, fmt, ap));
	va_end(ap);
}

/* Returns 1, or 0 when there is no memory for it now. */
static int
server_put(struct session *s, const char *line)
{
	size_t n = strlen(line);

	if (!buf_ready(&s->server.peer.out, n))
		return 0;
	buf_put(&s->server.peer.out, line, n);
	log_dialogue(s, "SERVER >", line, n);
	return 1;
}

/* Send a command, with its CRLF, and expect its reply.  Returns 1, or 0 when
 * there is no memory for it now. */
static int
server_command(struct session *s, const char *line)
{
	if (!server_put(s, line))
		return 0;
	s->server.verb = verb_find(line);
	return 1;
}

/*
 * Ends of transactions and sessions.
 */

static void
envelope_reset(struct envelope *e)
{
	str_free(&e->from);
	str_free(&e->rcpt_list);
	memset(e, 0, sizeof *e);
}

static void
message_reset(struct message *m)
{
	spool_close(&m->spool);
	*m = (struct message){ .spool.fd = -1 };
}

static void
copy_forget(struct result *r)
{
	if (r->child != NULL)
		child_forget(r->child);
	r->child = NULL;
}

static void
result_reset(struct result *r)
{
	copy_forget(r);
	str_free(&r->reply);
	str_free(&r->quarantined);
	*r = (struct result){ .outcome = OUT_NONE };
}

/* XFORWARD lasts as long as its transaction (Postfix XFORWARD_README). */
static void
transaction_end(struct session *s)
{
	envelope_reset(&s->env);
	str_free(&s->xforward.addr);
	str_free(&s->xforward.helo);
	message_reset(&s->msg);
	result_reset(&s->result);
	str_free(&s->replay.header);
	s->replay = (struct replay){ .at_bol = 1 };
	str_free(&s->server.argument);
}

/*
 * How many of our connections to next hops have a local port: an index, so that
 * is_own_connection() rarely looks at all sessions.  Ports share a place.
 */
static unsigned short own_ports[4096];

static unsigned short *
own_port(const struct addr *a)
{
	return &own_ports[addr_port(a) % 4096];
}

/* Note our end of the connection to the next hop, or that there is none. */
static void
server_set_local(struct session *s, int fd)
{
	struct addr *a = &s->server.local;

	if (a->len > 0)
		--*own_port(a);
	a->len = sizeof a->u;
	if (fd == -1 || getsockname(fd, &a->u.sa, &a->len) == -1)
		a->len = 0;
	if (a->len > 0)
		++*own_port(a);
}

/*
 * Close the connection to the next hop.  Send QUIT first, but only when the
 * next hop can take a command: during a message nothing may look like its end.
 */
static void
server_close(struct session *s)
{
	struct peer *p = &s->server.peer;

	if (p->fd != -1 && s->server.verb == NULL && !p->eof && !p->err &&
	    server_put(s, "QUIT\r\n"))
		peer_drain(p, 0);
	peer_close(p);
	str_free(&s->server.ehlo);
	str_free(&s->server.farewell);
	server_set_local(s, -1);
	s->server.verb = NULL;
}

/* End the session: S_LINGER after a last reply, else S_DEAD.  Returns 1, as a
 * step does. */
static int
session_end(struct session *s, enum state state)
{
	server_close(s);
	clamd_cancel(s);
	transaction_end(s);
	return enter(s, state);
}

/* Send a last reply and end the session.  Returns 1. */
static int
hang_up(struct session *s, const char *reply)
{
	client_reply(s, "%s", reply);
	return session_end(s, S_LINGER);
}

/* Refuse a command.  Promise 10: a client that does not speak SMTP must not go
 * on until some of its lines are commands.  Returns 1. */
static int
refuse(struct session *s, const char *reply)
{
	if (++s->refusals < MAXREFUSALS) {
		client_reply(s, "%s", reply);
		return 1;
	}
	slog(s, LOG_WARNING, "CLIENT: %d commands refused, session ends",
	    s->refusals);
	return hang_up(s, r_too_many);
}

/*
 * The outcome of a message.  settle() or settle_relay() decides it once, with
 * the reply that the client gets.  The log, the counters and the client get it
 * from there.
 */

const char outcome_names[NOUTCOMES][12] = {
	"clean", "virus", "clamd_error", "unscanned", "oversize", "error"
};

/* The outcome of a message that was scanned and met no error. */
static enum outcome
verdict_outcome(const struct session *s)
{
	if (s->result.verdict == CLEAN)
		return OUT_CLEAN;
	if (s->result.verdict == VIRUS)
		return OUT_VIRUS;
	if (s->conf->failopen)
		return OUT_UNSCANNED;
	return s->result.verdict == TOOBIG ? OUT_OVERSIZE : OUT_CLAMD_ERROR;
}

static void
settle_text(struct session *s, enum outcome what, const char *p, size_t n)
{
	if (s->result.outcome != OUT_NONE)
		abort();	/* it was settled before */
	s->result.outcome = what;
	if (str_set(&s->result.reply, p, n) == -1)
		client_nomem(s);
}

static void __attribute__((format(printf, 3, 4)))
settle(struct session *s, enum outcome what, const char *fmt, ...)
{
	char line[NOTESZ];
	va_list ap;

	va_start(ap, fmt);
	settle_text(s, what, line, format_line(line, fmt, ap));
	va_end(ap);
}

/* Promise 9: the line of the log that each message gets. */
static void
message_log_line(struct session *s)
{
	static const char status[NOUTCOMES][16] = {
		"CLEAN", "VIRUS:", "CLAMAV-ERROR", "UNSCANNED", "OVERSIZE",
		"ERROR"
	};
	enum outcome what = s->result.outcome;
	const char *p, *end, *word, *virus;
	char line[LOGSZ];
	size_t n, room;

	virus = what == OUT_VIRUS ? s->result.text : "";
	room = sizeof line - sizeof "100000: , to=..., status=" -
	    strlen(status[what]) - strlen(virus);
	n = format(line, room / 2, "from=%s",
	    printable_word(s->env.from.s, s->env.from.len));
	for (p = s->env.rcpt_list.s; p != NULL && *p != '\0'; p = end + 1) {
		end = strchr(p, '\n');
		word = printable_word(p, end - p);
		if (n + strlen(word) + 5 > room) {
			n += format(line + n, sizeof line - n, ", to=...");
			break;
		}
		n += format(line + n, sizeof line - n, ", to=%s", word);
	}
	slog(s, LOG_INFO, "%.*s, status=%s%s", (int)n, line, status[what],
	    virus);
}

static void
message_log_json(struct session *s)
{
	const struct result *r = &s->result;
	const char *client = addr_text(&s->client_addr);
	const char *status = outcome_names[r->outcome];

	json_begin(s, LOG_INFO);
	json_text("event", "mail", 4);
	json_text("status", status, strlen(status));
	if (r->verdict == VIRUS)
		json_text("virus", r->text, strlen(r->text));
	if (r->verdict == FAILED)
		json_text("reason", r->text, strlen(r->text));
	json_text("client", client, strlen(client));
	if (s->helo.len > 7)		/* after the verb, without the CRLF */
		json_text("helo", s->helo.s + 5, s->helo.len - 7);
	json_text("from", s->env.from.s, s->env.from.len);
	json_lines("to", s->env.rcpt_list.s);
	json_number("size", s->msg.size);
	json_number("ms", now - s->msg.dot_at);
	if (r->verdict_at != 0)
		json_number("scan_ms", r->verdict_at - s->msg.dot_at);
	if (r->reply.len > 0)
		json_text("reply", r->reply.s, strcspn(r->reply.s, "\r\n"));
	if (r->quarantined.len > 0)
		json_text("quarantine", r->quarantined.s, r->quarantined.len);
	json_end(LOG_INFO);
}

/* Count and log a complete message when its outcome is settled. */
static void
message_log(struct session *s)
{
	count.all_messages++;
	count.messages[s->result.outcome]++;
	count.bytes += s->msg.size;
	if (!log_json)
		message_log_line(s);
	else if (log_level >= LOG_INFO)
		message_log_json(s);
}

/* Do not forward a complete message whose outcome is settled: reset the
 * transaction at the next hop, then reply to the client.  Returns 1. */
static int
reject_message(struct session *s)
{
	message_log(s);
	return enter(s, S_RESET);
}

/* Send the reply to a message.  The session may go on or end.  Returns 1. */
static int
message_done(struct session *s, int go_on)
{
	client_put(s, s->result.reply.s, s->result.reply.len);
	if (!go_on)
		return session_end(s, S_LINGER);
	transaction_end(s);
	return enter(s, S_COMMAND);
}

/* Settle a message as failed, unless it is settled.  Between 354 and the end of
 * data the client gets no reply: the rest of the message is discarded, and the
 * reply to the end of data is the first error. */
static void __attribute__((format(printf, 3, 4)))
fail_message(struct session *s, enum outcome what, const char *fmt, ...)
{
	char line[NOTESZ];
	va_list ap;

	if (s->result.outcome != OUT_NONE)
		return;
	va_start(ap, fmt);
	settle_text(s, what, line, format_line(line, fmt, ap));
	va_end(ap);
	if (s->result.reply.len > 2)
		slog(s, LOG_WARNING, "message will be refused: %.*s",
		    (int)s->result.reply.len - 2, s->result.reply.s);
}

static void
fail_message_errno(struct session *s, const char *what)
{
	int full = errno == ENOSPC || errno == EDQUOT || errno == EMFILE ||
	    errno == ENFILE || errno == ENOMEM || errno == EFBIG;

	fail_message(s, OUT_ERROR, full ? r_full : r_local, what,
	    strerror(errno));
}

/* The next hop was lost before the message was sent. */
static void
fail_server_lost(struct session *s)
{
	struct str *farewell = &s->server.farewell;

	if (s->result.outcome == OUT_NONE && farewell->len > 0)
		settle_text(s, OUT_ERROR, farewell->s, farewell->len);
	else
		fail_message(s, OUT_ERROR, r_server_lost_mail, s->server.why);
}

/* Close the connection to the next hop because of an error. */
static void
server_drop(struct session *s, const char *why)
{
	slog(s, LOG_WARNING, "SERVER: %s%s", why, s->state == S_FINAL ?
	    ": it may have accepted the message" : "");
	s->server.why = why;
	s->server.verb = NULL;
	peer_close(&s->server.peer);
}

/* Close the connection to the next hop while the client waits for a reply from
 * there.  The client gets a reply of ours, and the session ends.  Returns 1. */
static int
server_lost(struct session *s, const char *why)
{
	server_drop(s, why);
	switch (s->state) {
	case S_DATA:
	case S_REPLAY:
	case S_FINAL:
		settle(s, OUT_ERROR, r_server_lost_mail, why);
		message_log(s);
		/* FALLTHROUGH */
	case S_RESET:
		return message_done(s, 0);
	default:
		client_reply(s, r_server_lost, why);
		return session_end(s, S_LINGER);
	}
}

/*
 * The client's connection.
 */

static int
is_body(const struct session *s)
{
	return s->state == S_BODY || s->state == S_CHUNK;
}

static int
client_fill(struct session *s)
{
	int got = peer_fill(&s->client, is_body(s));

	if (s->client.eof)
		s->eof_at = now;
	return got;
}

static int
line_waits(const struct session *s)
{
	const struct buf *in = &s->client.in;

	return memchr(buf_head(in), '\n', buf_len(in)) != NULL;
}

/* End the session if the client's connection ended and no complete line of it
 * waits.  Returns 1 when the session ended. */
static int
client_ended(struct session *s)
{
	if (!s->client.err && (!s->client.eof || line_waits(s)))
		return 0;
	if (s->state == S_CONNECT || s->state == S_GREETING)
		slog(s, LOG_DEBUG, "CLIENT: gone before the greeting");
	if (s->env.have_mail)
		slog(s, LOG_NOTICE, "CLIENT: closed the connection "
		    "in the middle of a transaction");
	return session_end(s, S_LINGER);	/* it may be a half-close */
}

/*
 * Returns 1 when the client gave up and will send its message again, else 0.
 * It gave up if it reset the connection, or if it sent EOF more than
 * HALF_CLOSE_TIME after the end of data and no complete command before that.
 * EOF soon after the end of data is a half-close: many devices send no QUIT.
 */
static int
client_gone(struct session *s)
{
	if (!s->client.eof)
		return s->client.err;
	return peer_reset(&s->client) ||
	    (s->eof_at - s->msg.dot_at > HALF_CLOSE_TIME && !line_waits(s));
}

/* For the log: the reason why a body does not end, if it is bare LFs. */
static const char *
bare_lf(const struct session *s)
{
	return s->state == S_BODY && s->msg.body_state == LINE &&
	    s->msg.held_bytes == 0 ?
	    ": client ends lines with LF alone" : "";
}

/* The client gave up: the next hop must not get the message.  Returns 1. */
static int
abort_transaction(struct session *s)
{
	slog(s, LOG_NOTICE, "CLIENT: gone before its message was forwarded%s",
	    bare_lf(s));
	return session_end(s, S_DEAD);
}

/*
 * Replies of the next hop.
 */

static const char *
first_line(const struct reply *r)
{
	size_t n = (const char *)memchr(r->text, '\n', r->len) - r->text;

	return printable(r->text, n > 0 && r->text[n - 1] == '\r' ? n - 1 : n);
}

static void
log_refusal(const struct session *s, const struct reply *r)
{
	slog(s, LOG_NOTICE, "SERVER: refused the message: %s", first_line(r));
}

/* Returns the code of a reply line (RFC 5321 4.2), or 0 when it is none. */
static int
reply_code(const char *p, size_t n)
{
	if (n < 4 || p[0] < '2' || p[0] > '5' ||
	    !isdigit((unsigned char)p[1]) || !isdigit((unsigned char)p[2]) ||
	    strchr(" -\r\n", p[3]) == NULL || p[3] == '\0')
		return 0;
	return (p[0] - '0') * 100 + (p[1] - '0') * 10 + p[2] - '0';
}

/* The state of a reply. */
enum got {
	LOST = -1,			/* it will not come: server.why */
	WAIT,				/* the rest is still to come */
	REPLY				/* it is complete */
};

/* Look for a complete reply in the input from the next hop.  reply_eat()
 * removes it from there. */
static enum got
server_reply(struct session *s, struct reply *r)
{
	struct buf *in = &s->server.peer.in;
	const char *line, *nl;
	int code;

	r->text = buf_head(in);
	while (s->server.reply_seen < buf_len(in)) {
		line = r->text + s->server.reply_seen;
		nl = memchr(line, '\n', buf_len(in) - s->server.reply_seen);
		if (nl == NULL)
			break;
		code = reply_code(line, nl + 1 - line);
		r->code = reply_code(r->text, buf_len(in));
		r->class = r->code / 100;
		if (code == 0 || code != r->code) {
			s->server.why = "not an SMTP reply";
			return LOST;
		}
		s->server.reply_seen = nl + 1 - r->text;
		if (line[3] != '-' && s->server.reply_seen <= REPLYSZ) {
			r->len = s->server.reply_seen;
			r->verb = s->server.verb;
			s->server.verb = NULL;
			log_dialogue(s, "SERVER <", r->text, r->len);
			return REPLY;
		}
	}
	if (buf_len(in) > REPLYSZ)		/* promise 6 */
		s->server.why = "reply too long";
	else if (s->server.peer.eof)
		s->server.why = "connection closed";
	else
		return WAIT;
	return LOST;
}

static void
reply_eat(struct session *s, const struct reply *r)
{
	if (s->server.peer.fd == -1)
		return;			/* closed, and the buffer freed */
	s->server.reply_seen = 0;
	buf_eat(&s->server.peer.in, r->len);
}

/*
 * Promise 8: the last reply that was cleaned, as the client may see it.  Each
 * line ends in CRLF, and each byte that is not text is a space.  reply_clean()
 * returns the length; a NUL follows.
 */
static char clean[RELAYSZ + 1];

static size_t
reply_clean(const struct reply *r)
{
	const char *p = r->text, *end = p + r->len;
	char *w = clean;
	size_t len;

	for (; p < end; p += len)
		if ((len = text_char(p, end - p)) > 0) {
			memcpy(w, p, len);
			w += len;
		} else {
			len = 1;
			if (*p == '\n')
				*w++ = '\r';
			if (*p != '\r' || p[1] != '\n')
				*w++ = *p == '\n' ? '\n' : ' ';
		}
	*w = '\0';
	return w - clean;
}

/* The reply to a message that was sent to the next hop decides its outcome. */
static void
settle_relay(struct session *s, const struct reply *r)
{
	settle_text(s, verdict_outcome(s), clean, reply_clean(r));
}

static void
relay(struct session *s, const struct reply *r)
{
	client_put(s, clean, reply_clean(r));
}

/* Relay a reply that ends the session.  Returns 1. */
static int
relay_and_close(struct session *s, const struct reply *r)
{
	relay(s, r);
	peer_close(&s->server.peer);
	return session_end(s, S_LINGER);
}

/* Pass the reply of the next hop to on_reply(), which returns 1.  Returns 1, or
 * 0 when the reply is not complete. */
static int
await_reply(struct session *s,
    int (*on_reply)(struct session *, const struct reply *))
{
	struct reply r;
	enum got got;

	if (!client_ready(s))
		return 0;
	if ((got = server_reply(s, &r)) != REPLY)
		return got == LOST && server_lost(s, s->server.why);
	on_reply(s, &r);
	reply_eat(s, &r);
	return 1;
}

/* Returns 1 when input from the next hop, or its EOF, has been read. */
static int
server_input(const struct session *s)
{
	return buf_len(&s->server.peer.in) > 0 || s->server.peer.eof;
}

/* Returns the time at which a NOOP is to be sent, or 0 when none is.  NOOPs are
 * sent while the next hop waits for the client or for clamd. */
static int64_t
keep_alive_at(const struct session *s)
{
	if ((!is_body(s) && s->state != S_SCAN && s->state != S_QUARANTINE) ||
	    s->server.peer.fd == -1 || s->server.verb != NULL ||
	    buf_len(&s->server.peer.in) > 0 || s->result.outcome != OUT_NONE)
		return 0;
	return s->server.noop_at;
}

/* Whether the next hop can take a command. */
enum idle {
	GONE = -1,			/* server.why, server.farewell */
	WAITING,			/* it owes us a reply */
	READY
};

/*
 * Read what the next hop sends while the session waits for the client or clamd:
 * the reply to a NOOP.  Any other reply ends the connection.  Send a NOOP when it
 * is due.
 */
static enum idle
server_idle(struct session *s)
{
	struct reply r;
	int64_t at;
	enum got got;

	while (s->server.peer.fd != -1 && server_input(s)) {
		if ((got = server_reply(s, &r)) == WAIT)
			return WAITING;
		if (got == LOST) {
			server_drop(s, s->server.why);
			break;
		}
		if (verb_is(r.verb, "NOOP") && r.class == 2) {
			s->server.noop_at = now + s->conf->keepalives;
			reply_eat(s, &r);
			continue;
		}
		slog(s, LOG_NOTICE, "SERVER: unexpected reply during a "
		    "message: %s", first_line(&r));
		if (r.class == 4 && str_set(&s->server.farewell, clean,
		    reply_clean(&r)) == -1)
			client_nomem(s);
		server_drop(s, "NOOP refused");
	}
	if (s->server.peer.fd == -1)
		return GONE;
	if ((at = keep_alive_at(s)) != 0 && now >= at) {
		server_command(s, "NOOP\r\n");
		s->server.noop_at = now + s->conf->keepalives;
	}
	return s->server.verb == NULL ? READY : WAITING;
}

/*
 * The session table.
 *
 * When most sessions are idle, polling all of them costs more than the mail of
 * the others: with 1,000 idle sessions a message of 2 KB took 714 us of CPU, and
 * takes 92 us now.  So v[0] to v[nactive - 1] are the sessions that ran lately
 * and do not wait for a slot, and most passes of the loop poll only these.  A
 * full pass polls all sessions.
 */
static struct {
	struct session **v;
	int	 n, nactive, size;
	int	 full;			/* this is a full pass */
	int64_t	 full_at;		/* when the last full pass began */
} table;

static void
table_move(struct session *s, int to)
{
	struct session *other = table.v[to];

	other->index = s->index;
	table.v[other->index] = other;
	s->index = to;
	table.v[to] = s;
}

static void
session_activate(struct session *s)
{
	if (s->index >= table.nactive)
		table_move(s, table.nactive++);
}

static void
session_idle(struct session *s)
{
	if (s->index < table.nactive)
		table_move(s, --table.nactive);
}

static int
is_own_connection(const struct addr *from, const struct addr *to)
{
	const struct session *s;
	int i;

	if (from->u.sa.sa_family == AF_UNIX || *own_port(from) == 0)
		return 0;
	for (i = 0; i < table.n; i++) {
		s = table.v[i];
		if (s->server.peer.fd != -1 && addr_equal(&s->server.local, from) &&
		    (to == NULL || addr_equal(&s->server.addr, to)))
			return 1;
	}
	return 0;
}

/*
 * PROXY.
 */

/* Find the original destination of a redirected connection: conntrack knows it
 * after REDIRECT, and after TPROXY it is the local address. */
static void
original_target(int fd, const struct addr *local, struct addr *a)
{
	int v6 = local->u.sa.sa_family == AF_INET6;

	memset(a, 0, sizeof *a);
	a->len = sizeof a->u;
	if (getsockopt(fd, v6 ? IPPROTO_IPV6 : IPPROTO_IP, ORIGINAL_DST, &a->u,
	    &a->len) == -1)
		*a = *local;
	addr_unmap(a);
}

/* Compare both ends: the kernel gives one local port to several connections
 * with different remote addresses. */
static int
is_loop(int fd, const struct addr *client, const struct addr *local)
{
	struct addr redirected;

	if (!is_own_connection(client, NULL))
		return 0;
	original_target(fd, local, &redirected);
	return is_own_connection(client, local) ||
	    is_own_connection(client, &redirected);
}

static int
is_proxy(const struct conf *c, const struct addr *a)
{
	int i;

	for (i = 0; i < c->nproxies; i++)
		if (addr_in(a, &c->proxies[i].addr, c->proxies[i].bits))
			return 1;
	return 0;
}

/* Version 2, after its signature. */
static int
proxy_parse_v2(const unsigned char *p, size_t n, struct addr *a)
{
	size_t len;

	if (n < 16)
		return 0;
	len = p[14] << 8 | p[15];
	if ((p[12] != 0x20 && p[12] != 0x21) || len > PROXYSZ)
		return -1;
	if (n < 16 + len)
		return 0;
	if (p[12] == 0x20)		/* LOCAL: the proxy for itself */
		return 16 + len;
	if (p[13] == 0x11) {
		if (len < 12)
			return -1;
		a->len = sizeof a->u.in;
		a->u.in.sin_family = AF_INET;
		memcpy(&a->u.in.sin_addr, p + 16, 4);
		memcpy(&a->u.in.sin_port, p + 24, 2);
	} else if (p[13] == 0x21) {
		if (len < 36)
			return -1;
		a->len = sizeof a->u.in6;
		a->u.in6.sin6_family = AF_INET6;
		memcpy(&a->u.in6.sin6_addr, p + 16, 16);
		memcpy(&a->u.in6.sin6_port, p + 48, 2);
	}
	addr_unmap(a);
	return 16 + len;
}

/* Version 1: PROXY TCP4 from to port port CRLF, or PROXY UNKNOWN. */
static int
proxy_parse_v1(const char *p, size_t n, struct addr *a)
{
	const char *nl = memchr(p, '\n', n < 107 ? n : 107);
	char line[108], *from = line + 11, *to, *port;
	int64_t number;

	if (nl == NULL)
		return n < 107 ? 0 : -1;
	format(line, sizeof line, "%.*s", (int)(nl - p), p);
	if (nl[-1] != '\r')
		return -1;
	line[nl - 1 - p] = '\0';
	if (strncmp(line, "PROXY UNKNOWN", 13) == 0)
		return nl + 1 - p;
	if (strncmp(line, "PROXY TCP4 ", 11) != 0 &&
	    strncmp(line, "PROXY TCP6 ", 11) != 0)
		return -1;
	if ((to = strchr(from, ' ')) == NULL ||
	    (port = strchr(to + 1, ' ')) == NULL)
		return -1;
	*to = '\0';
	if (parse_number(port + 1, " \t", &number) != 1 || number > 65535 ||
	    addr_ip(a, from, number) == -1 ||
	    (line[9] == '6') != (strchr(from, ':') != NULL))
		return -1;
	return nl + 1 - p;
}

/*
 * Parse a PROXY header (HAProxy's proxy-protocol.txt, versions 1 and 2) at the
 * start of n bytes.  Returns its length, and in *a the client that it names
 * (a->len is 0 if it names none); 0 if more bytes are needed; or -1 if there
 * is no PROXY header.
 */
static int
proxy_parse(const char *p, size_t n, struct addr *a)
{
	static const char v1[] = "PROXY ", v2[] = "\r\n\r\n\0\r\nQUIT\n";

	memset(a, 0, sizeof *a);
	if (memcmp(p, v2, n < 12 ? n : 12) == 0)
		return proxy_parse_v2((const unsigned char *)p, n, a);
	if (memcmp(p, v1, n < 6 ? n : 6) == 0)
		return proxy_parse_v1(p, n, a);
	return -1;
}

static int
st_proxy(struct session *s)
{
	struct buf *in = &s->client.in;
	struct addr a;
	int n;

	if (is_proxy(s->conf, &s->peer_addr)) {
		n = proxy_parse(buf_head(in), buf_len(in), &a);
		if (n == 0 && !s->client.eof)
			return 0;
		if (n <= 0) {
			slog(s, LOG_WARNING, "%s: no valid PROXY header, but "
			    "the address is in ProxyFrom",
			    addr_text(&s->peer_addr));
			return session_end(s, S_DEAD);
		}
		buf_eat(in, n);
		if (a.len > 0)
			s->client_addr = a;
	}
	slog(s, LOG_INFO, "accepted connection from: %s",
	    addr_text(&s->client_addr));
	enter(s, S_CONNECT);
	if (!is_loop(s->client.fd, &s->peer_addr, &s->local_addr))
		return 1;
	slog(s, LOG_ERR, "mail loop: %s is our own connection to a next hop; "
	    "check OutAddress or the firewall's redirection",
	    addr_full(&s->peer_addr));
	return hang_up(s, r_loop);
}

/*
 * CONNECT.
 */

/* Set server.addr to the next address to try.  Returns 1, 0 while the name is
 * being resolved, -1 when there is no address. */
static int
server_next_addr(struct session *s)
{
	struct target *t = s->conf->out;

	if (s->conf->transparent)	/* session_new() has found it */
		return s->server.addr.len == 0 ||
		    s->server.addr.u.sa.sa_family == AF_UNIX ? -1 : 1;
	if (t->naddr == 0 && t->name == NULL) {
		s->server.addr = s->peer_addr;
		if (s->peer_addr.u.sa.sa_family == AF_UNIX)
			addr_ip(&s->server.addr, "127.0.0.1", 0);
		addr_set_port(&s->server.addr, t->port);
		return 1;
	}
	s->server.addr_index = target_next(t, s->server.addrs_tried);
	if (s->server.addr_index < 0)
		return s->server.addr_index == RESOLVING ? 0 : -1;
	s->server.addr = t->addr[s->server.addr_index];
	return 1;
}

static int
connect_failed(struct session *s, const char *why)
{
	struct target *t = s->conf->transparent ? NULL : s->conf->out;

	slog(s, LOG_WARNING, "SERVER: couldn't connect to: %s: %s",
	    s->server.addr.len > 0 || t == NULL ? addr_full(&s->server.addr) :
	    t->text, why);
	if (t != NULL)
		target_resolve(t, 1);
	client_reply(s, r_no_server, why);
	return session_end(s, S_LINGER);
}

/* The greeting is the reply to this. */
static const struct verb verb_connect = { "connect", NULL, NULL, 0, 0 };

static int
st_connect(struct session *s)
{
	struct target *t = s->conf->out;
	int got, err, naddr = s->conf->transparent || t->naddr == 0 ? 1 :
	    t->naddr;

	if (client_ended(s))
		return 1;
	if (s->server.peer.fd == -1) {
		switch (server_next_addr(s)) {
		case 0:
			return now < s->deadline ? 0 :
			    connect_failed(s, "the name is still being resolved");
		case -1:
			return connect_failed(s, "no address");
		}
		s->server.verb = &verb_connect;
		server_set_local(s, -1);
	}
	got = peer_connect(&s->server.peer, &s->server.addr, &s->deadline,
	    s->conf->timeout / naddr);
	if (got == -1) {
		err = errno;
		s->server.addrs_tried |= 1U << s->server.addr_index;
		if (s->conf->transparent ||
		    target_next(t, s->server.addrs_tried) < 0)
			return connect_failed(s, strerror(err));
		return 1;
	}
	if (s->server.local.len == 0)
		server_set_local(s, s->server.peer.fd);
	if (got == 1)
		enter(s, S_GREETING);
	return got;
}

/*
 * GREETING.
 */

static int
greeting_reply(struct session *s, const struct reply *r)
{
	switch (r->class) {
	case 2:
		if (!s->conf->transparent)
			target_worked(s->conf->out, &s->server.addr);
		client_reply(s, "%d " OUR_NAME, r->code);
		return enter(s, S_COMMAND);
	case 3:
		return server_lost(s, "unexpected 3xx greeting");
	case 4:
		return relay_and_close(s, r);
	default:			/* RFC 5321 3.1: 503 until QUIT */
		slog(s, LOG_NOTICE, "SERVER: refused the session: %s",
		    first_line(r));
		relay(s, r);
		s->rejected = 1;
		server_close(s);
		return enter(s, S_COMMAND);
	}
}

static int
st_greeting(struct session *s)
{
	return client_ended(s) || await_reply(s, greeting_reply);
}

/*
 * COMMAND: the verbs.
 */

static int
no_memory(struct session *s)
{
	client_reply(s, r_full, "memory", strerror(ENOMEM));
	return 1;
}

/* Returns the size of the largest message that is scanned, in bytes, or 0 for
 * no limit.  The scan line counts against MaxScanSize, as it does at clamd. */
static int64_t
scan_limit(const struct session *s)
{
	int64_t max = s->conf->maxscansize, line = scan_line_len;

	if (max > line)
		return max - line;
	return max > 0;
}

/* Returns the size of the largest message that is accepted, in bytes, or 0 for
 * no limit.  With ScanFailure: pass a larger one is forwarded unscanned. */
static int64_t
size_limit(const struct session *s)
{
	int64_t max = s->conf->failopen ? 0 : scan_limit(s);

	if (max == 0 || (s->server.size > 0 && s->server.size < max))
		max = s->server.size;
	return max;
}

/* Keep the bare address of a line such as "MAIL FROM:<...> ...".  Returns the
 * parameters after it, or NULL without memory, and the client has its reply. */
static const char *
path_parse(struct session *s, const char *line)
{
	const char *p = line + strcspn(line, ":"), *addr;
	int quoted = 0;

	if (*p == ':')
		p += 1 + strspn(p + 1, " \t");
	addr = p;
	if (*p != '<')
		p += strcspn(p, " \t");
	else {
		for (p = ++addr; *p != '\0' && (quoted || *p != '>'); p++)
			if (*p == '\\' && p[1] != '\0')
				p++;
			else if (*p == '"')
				quoted = !quoted;
		if (*p == '\0')		/* a quote is missing */
			p = addr + strcspn(addr, ">");
	}
	if (str_set(&s->server.argument, addr, p - addr) == -1) {
		no_memory(s);
		return NULL;
	}
	return *p == '>' ? p + 1 : p;
}

static int
mail_command(struct session *s, char *line)
{
	int64_t limit = size_limit(s), size;
	const char *p = path_parse(s, line);

	if (p == NULL)
		return 1;
	for (p += strspn(p, " \t"); *p != '\0';
	    p += strcspn(p, " \t"), p += strspn(p, " \t")) {
		if (strncasecmp(p, "SIZE=", 5) == 0 && limit > 0 &&
		    parse_number(p + 5, " \t", &size) != -1 && size > limit) {
			client_reply(s, r_too_big, (long long)limit);
			return 1;
		}
		if (strncasecmp(p, "BODY=BINARYMIME", 15) == 0)
			return refuse(s, r_binary);
	}
	return 0;
}

static int
mail_reply(struct session *s, const struct reply *r)
{
	if (r->class != 2)
		return 0;
	envelope_reset(&s->env);
	s->env.have_mail = 1;
	s->env.from = s->server.argument;
	memset(&s->server.argument, 0, sizeof s->server.argument);
	if (s->env.from.len == 0 && str_set(&s->env.from, "<>", 2) == -1)
		client_nomem(s);
	return 0;
}

static int
rcpt_command(struct session *s, char *line)
{
	return path_parse(s, line) == NULL;
}

/* All recipients are counted, but at most RCPTSZ bytes of them are kept. */
static int
rcpt_reply(struct session *s, const struct reply *r)
{
	if (r->class != 2)
		return 0;
	s->env.nrcpt++;
	if (s->env.rcpt_truncated)
		return 0;
	if (s->env.rcpt_list.len + s->server.argument.len + 1 > RCPTSZ) {
		slog(s, LOG_NOTICE, "too many recipients: RECIPIENTS and "
		    "the log contain only the first ones");
		s->env.rcpt_truncated = 1;
		str_set(&s->server.argument, "...", 3);
	}
	if (str_add(&s->env.rcpt_list, s->server.argument.s,
	    s->server.argument.len) == -1 ||
	    str_add(&s->env.rcpt_list, "\n", 1) == -1)
		client_nomem(s);
	return 0;
}

static int
rset_reply(struct session *s, const struct reply *r)
{
	if (r->class == 2)
		transaction_end(s);
	return 0;
}

static int
helo_command(struct session *s, char *line)
{
	return (str_set(&s->helo, line, strlen(line)) == -1 ||
	    str_add(&s->helo, "\r\n", 2) == -1) && no_memory(s);
}

static int
starttls_command(struct session *s, char *line)
{
	(void)line;
	return refuse(s, r_no_tls);
}

static int
xclient_command(struct session *s, char *line)
{
	(void)line;
	slog(s, LOG_WARNING,
	    "client attempted use of privileged XCLIENT feature");
	return refuse(s, r_xclient);
}

static int
xforward_command(struct session *s, char *line)
{
	if (s->env.have_mail)
		return refuse(s, r_sequence);
	return str_set(&s->server.argument, line, strlen(line)) == -1 &&
	    no_memory(s);
}

/* Decode xtext (RFC 3461 4). */
static int
xtext_decode(struct str *to, const char *p, size_t n)
{
	char hex[3] = "", c;
	size_t i;

	str_free(to);
	if (n > 5 && strncasecmp(p, "IPV6:", 5) == 0) {
		p += 5;
		n -= 5;
	}
	if (n == 0 || *p == '[')	/* [UNAVAILABLE], [TEMPUNAVAIL] */
		return 0;
	for (i = 0; i < n && to->len < 255; i++) {
		c = p[i];
		if (c == '+' && i + 2 < n && isxdigit((unsigned char)p[i + 1]) &&
		    isxdigit((unsigned char)p[i + 2])) {
			hex[0] = p[++i];
			hex[1] = p[++i];
			c = strtol(hex, NULL, 16);
		}
		if (str_add(to, &c, 1) == -1)
			return -1;
	}
	return 0;
}

static int
xforward_reply(struct session *s, const struct reply *r)
{
	const char *p = s->server.argument.s;
	size_t n;
	int bad = 0;

	if (r->class != 2)
		return 0;
	for (; *p != '\0'; p += n, p += strspn(p, " \t")) {
		n = strcspn(p, " \t");
		if (strncasecmp(p, "ADDR=", 5) == 0)
			bad |= xtext_decode(&s->xforward.addr, p + 5, n - 5);
		else if (strncasecmp(p, "HELO=", 5) == 0)
			bad |= xtext_decode(&s->xforward.helo, p + 5, n - 5);
	}
	if (bad)
		client_nomem(s);
	str_free(&s->server.argument);
	return 0;
}

/*
 * EHLO: only extensions pass that keep the message where we can see it.  An
 * unknown extension may be a way around clamd.
 */
static const char ehlo_keywords[][20] = {
	"SIZE", "8BITMIME", "DSN", "SMTPUTF8", "ENHANCEDSTATUSCODES", "AUTH",
	"ETRN", "VRFY", "EXPN", "HELP", "XFORWARD", "DELIVERBY",
};

static void
learn_xclient(struct session *s, const char *p)
{
	size_t n;

	for (; *p != '\0'; p += n, p += strspn(p, " \t\r")) {
		n = strcspn(p, " \t\r");
		if (word_equal(p, n, "NAME"))
			s->server.xclient |= X_NAME;
		else if (word_equal(p, n, "ADDR"))
			s->server.xclient |= X_ADDR;
		else if (word_equal(p, n, "PORT"))
			s->server.xclient |= X_PORT;
	}
}

/* Read a line of the EHLO reply, NUL-terminated and without its code.  Returns
 * 1 when the client may see it, else 0. */
static int
ehlo_line(struct session *s, const char *p)
{
	size_t i, n = strcspn(p, " =");
	int64_t size;

	if (word_equal(p, n, "CHUNKING"))
		s->server.chunking = 1;
	if (word_equal(p, n, "XCLIENT"))
		learn_xclient(s, p + n);
	if (word_equal(p, n, "SIZE") && p[n] == ' ' &&
	    parse_number(p + n + 1, " \t", &size) != -1)
		s->server.size = size;
	if (p[n] == '=')		/* AUTH=, which old clients look for */
		return word_equal(p, n, "AUTH");
	for (i = 0; i < sizeof ehlo_keywords / sizeof ehlo_keywords[0]; i++)
		if (word_equal(p, n, ehlo_keywords[i]))
			return 1;
	return 0;
}

static void
ehlo_add(struct session *s, const char *code, const char *text)
{
	if (str_add(&s->server.ehlo, code, strlen(code)) == -1 ||
	    str_add(&s->server.ehlo, text, strlen(text)) == -1 ||
	    str_add(&s->server.ehlo, "\r\n", 2) == -1)
		client_nomem(s);
}

/* Keep in server.ehlo what the client may see of a reply to HELO or EHLO. */
static void
ehlo_filter(struct session *s, const struct reply *r, int esmtp)
{
	char *p, *next, size[48];

	s->server.size = s->server.chunking = s->server.xclient = 0;
	str_free(&s->server.ehlo);
	ehlo_add(s, esmtp ? "250-" : "250 ", OUR_NAME);
	if (!esmtp)
		return;
	reply_clean(r);
	for (p = strchr(clean, '\n') + 1; *p != '\0'; p = next + 1) {
		next = strchr(p, '\n');
		next[-1] = '\0';
		if (!ehlo_line(s, p + 4))
			continue;
		if (strncasecmp(p + 4, "SIZE", 4) == 0 && size_limit(s) > 0) {
			format(size, sizeof size, "SIZE %lld",
			    (long long)size_limit(s));
			ehlo_add(s, "250-", size);
		} else
			ehlo_add(s, "250-", p + 4);
	}
	ehlo_add(s, s->server.chunking ? "250-" : "250 ", "PIPELINING");
	if (s->server.chunking)
		ehlo_add(s, "250 ", "CHUNKING");
}

/* Tell the next hop the client's address, for it sees ours.  Returns 1. */
static int
xclient_send(struct session *s)
{
	char line[NOTESZ];
	size_t n;
	int x = s->server.xclient, ip = s->client_addr.u.sa.sa_family != AF_UNIX;

	n = format(line, sizeof line, "XCLIENT");
	if (x & X_NAME)
		n += format(line + n, sizeof line - n, " NAME=[UNAVAILABLE]");
	if (x & X_ADDR)
		n += format(line + n, sizeof line - n, " ADDR=%s%s",
		    s->client_addr.u.sa.sa_family == AF_INET6 ? "IPV6:" : "",
		    ip ? addr_text(&s->client_addr) : "[UNAVAILABLE]");
	if ((x & X_PORT) && ip)
		n += format(line + n, sizeof line - n, " PORT=%u",
		    addr_port(&s->client_addr));
	format(line + n, sizeof line - n, "\r\n");
	if (!server_command(s, line))
		return server_lost(s, "out of memory");
	return enter(s, S_REPLY);
}

static int
ehlo_send(struct session *s)
{
	if (!s->client.err)
		client_put(s, s->server.ehlo.s, s->server.ehlo.len);
	str_free(&s->server.ehlo);
	return enter(s, S_COMMAND);
}

/*
 * Promise 10: XCLIENT is sent at the first HELO or EHLO that is accepted.
 * Later it would undo an AUTH.  The reply to HELO lists no attributes, so NAME
 * and ADDR are tried.  If the next hop refuses them, a later EHLO may still
 * list them.
 */
static int
hello_reply(struct session *s, const struct reply *r)
{
	int esmtp = verb_is(r->verb, "EHLO");

	if (r->class != 2)
		return 0;
	transaction_end(s);
	ehlo_filter(s, r, esmtp);
	if (!esmtp)
		s->server.xclient = X_NAME | X_ADDR;
	if (s->xclient_state == XC_WANTED ||
	    (s->xclient_state == XC_EHLO && esmtp)) {
		if (s->server.xclient != 0)
			return xclient_send(s);
		slog(s, LOG_WARNING, "SERVER: does not offer "
		    "XCLIENT, and treats the client as this host");
		s->xclient_state = XC_DONE;
	}
	return ehlo_send(s);
}

static int xclient_reply(struct session *, const struct reply *);
static int data_command(struct session *, char *);
static int bdat_command(struct session *, char *);

static const struct verb verbs[] = {
	{ "EHLO", helo_command, hello_reply, 1, 1 },
	{ "HELO", helo_command, hello_reply, 1, 1 },
	{ "MAIL", mail_command, mail_reply, 0, 0 },
	{ "RCPT", rcpt_command, rcpt_reply, 0, 0 },
	{ "DATA", data_command, NULL, 0, 0 },
	{ "BDAT", bdat_command, NULL, 1, 1 },	/* there is no MAIL: 503 */
	{ "RSET", NULL, rset_reply, 1, 1 },
	{ "NOOP", NULL, NULL, 1, 1 },
	{ "QUIT", NULL, NULL, 1, 1 },
	{ "AUTH", NULL, NULL, 0, 0 },
	{ "VRFY", NULL, NULL, 1, 0 },
	{ "EXPN", NULL, NULL, 1, 0 },
	{ "HELP", NULL, NULL, 1, 1 },
	{ "ETRN", NULL, NULL, 0, 0 },
	{ "XFORWARD", xforward_command, xforward_reply, 0, 0 },
	{ "XCLIENT", xclient_command, xclient_reply, 1, 0 },
	{ "STARTTLS", starttls_command, NULL, 1, 0 },
};

/* The line may end in CRLF. */
static const struct verb *
verb_find(const char *line)
{
	size_t i, n = strcspn(line, " \t\r");

	for (i = 0; i < sizeof verbs / sizeof verbs[0]; i++)
		if (word_equal(line, n, verbs[i].name))
			return &verbs[i];
	return NULL;
}

/* XCLIENT resets the next hop to the state before HELO, so HELO or EHLO is sent
 * again, and the client gets the second reply. */
static int
xclient_reply(struct session *s, const struct reply *r)
{
	int helo = *s->helo.s == 'H' || *s->helo.s == 'h';

	if (r->code == 501 && helo && (s->server.xclient & X_NAME)) {
		s->server.xclient &= ~X_NAME;
		return xclient_send(s);
	}
	/* These codes refuse the command.  Any other 4xx or 5xx refuses the
	 * client, in place of the greeting that the next hop would send it. */
	if ((r->code >= 500 && r->code <= 504) || r->code == 550) {
		slog(s, LOG_WARNING, "SERVER: refused XCLIENT: %s",
		    first_line(r));
		s->xclient_state = helo ? XC_EHLO : XC_DONE;
		return ehlo_send(s);
	}
	if (r->class != 2) {
		slog(s, LOG_NOTICE, "SERVER: refused the client: %s",
		    first_line(r));
		if (r->code == 421)
			return 0;	/* command_reply() knows what to do */
		relay(s, r);
		return session_end(s, S_LINGER);
	}
	s->xclient_state = XC_DONE;
	if (!server_command(s, s->helo.s))
		return server_lost(s, "out of memory");
	return enter(s, S_REPLY);
}

/*
 * Promise 10: end the session when the client sends HTTP, or a line that begins
 * with a byte that is neither a letter nor a blank, as a TLS ClientHello does.
 * The line need not be complete, and may be empty.  Postfix has
 * smtpd_forbidden_commands for that.  Returns 1 when the session ended.
 */
static int
not_smtp(struct session *s)
{
	static const char words[][8] = { "CONNECT", "GET", "POST" };
	const char *p = buf_head(&s->client.in);
	size_t len = buf_len(&s->client.in), i, n;
	int bad;

	if (s->skipping || len == 0 || *p == ' ' || *p == '\t' || *p == '\n' ||
	    (*p == '\r' && (len == 1 || p[1] == '\n')))
		return 0;
	bad = (*p < 'A' || *p > 'Z') && (*p < 'a' || *p > 'z');
	for (n = 0; n < len && memchr(" \t\r\n", p[n], 4) == NULL; n++)
		;
	for (i = 0; i < sizeof words / sizeof words[0]; i++)
		if (n < len && word_equal(p, n, words[i]))
			bad = 1;
	if (!bad)
		return 0;
	for (n = 0; n < len && n < 60 && p[n] != '\n'; n++)
		;
	slog(s, LOG_WARNING, "CLIENT: does not speak SMTP, session ends: %s",
	    printable(p, n));
	return hang_up(s, r_not_smtp);
}

/*
 * Take a line from the client.  Returns 1 with the line, NUL-terminated and
 * without its end, 0 when it is not complete, -1 when it was refused.  *line
 * points into client.in: the caller calls buf_eat(&client.in, 0) after use.
 */
static int
client_line(struct session *s, char **line, size_t *n)
{
	struct buf *in = &s->client.in;
	size_t len = buf_len(in);
	char *p = buf_head(in), *nl = memchr(p, '\n', len);
	const char *why;

	if (nl == NULL) {
		if (len > LINESZ + 1 || s->skipping) {	/* promise 6 */
			s->skipping = 1;
			buf_eat(in, len);
		}
		return 0;
	}
	*line = p;
	*n = nl > p && nl[-1] == '\r' ? nl - p - 1 : nl - p;
	p[*n] = '\0';
	why = s->skipping || *n > LINESZ ? r_long :
	    memchr(p, '\0', *n) != NULL || memchr(p, '\r', *n) != NULL ?
	    r_control : NULL;
	s->skipping = 0;
	if (why != NULL) {
		buf_eat(in, nl + 1 - p);
		refuse(s, why);
		return -1;
	}
	in->r += nl + 1 - p;	/* buf_eat() would free the line */
	return 1;
}

/* The initial response of AUTH may be a password. */
static void
log_command(struct session *s, const char *who, const struct verb *v,
    const char *p, size_t n)
{
	size_t i = n > 5 ? 5 + strcspn(p + 5, " \t") : n;

	if (verb_is(v, "AUTH") && i < n)
		slog(s, LOG_DEBUG, "%s %s ***", who, printable(p, i));
	else
		log_dialogue(s, who, p, n);
}

/* Pass a line of the client on.  st_command() has made room.  Returns 1. */
static int
line_relay(struct session *s, const char *line, size_t n)
{
	buf_put(&s->server.peer.out, line, n);
	buf_put(&s->server.peer.out, "\r\n", 2);
	return enter(s, S_REPLY);
}

/* Returns 1. */
static int
command(struct session *s, char *line, size_t n)
{
	const struct verb *v = verb_find(line);

	log_command(s, "CLIENT <", v, line, n);
	if (v == NULL)
		return refuse(s, r_unknown);
	/* Promise 10: DATA is the last command of a group (RFC 2920 3.1).  A
	 * body that comes with it would be read as commands if DATA is
	 * refused. */
	if (verb_is(v, "DATA") && (buf_len(&s->client.in) > 0 ||
	    peer_peek(&s->client) > 0)) {
		slog(s, LOG_WARNING, "CLIENT: sent input after DATA without "
		    "waiting for the reply, session ends");
		return hang_up(s, r_early_body);
	}
	if (s->rejected && verb_is(v, "QUIT"))
		return hang_up(s, r_bye);
	if ((s->msg.in_bdat && !v->in_chunks) ||
	    (s->xclient_state == XC_WANTED && !v->unnamed) ||
	    (s->rejected && !verb_is(v, "BDAT")))	/* BDAT: chunk_end() */
		return refuse(s, r_sequence);
	if (v->on_command != NULL && v->on_command(s, line))
		return 1;
	log_command(s, "SERVER >", v, line, n);
	s->server.verb = v;
	return line_relay(s, line, n);
}

/* A reply without a command ends the session. */
static int
unasked_reply(struct session *s, const struct reply *r)
{
	slog(s, LOG_NOTICE, "SERVER: unexpected reply: %s", first_line(r));
	if (r->code < 400)	/* the client must not get it as a reply */
		return server_lost(s, "reply without a command");
	return relay_and_close(s, r);
}

/* For COMMAND and AUTH. */
static int
st_command(struct session *s)
{
	int auth = s->state == S_AUTH, got;
	char *line;
	size_t n;

	if (!client_ready(s) || !buf_ready(&s->server.peer.out, LINESZ + 2))
		return 0;
	if (server_input(s))
		return await_reply(s, unasked_reply) || client_ended(s);
	if (!auth && not_smtp(s))
		return 1;
	if ((got = client_line(s, &line, &n)) == 0)
		return client_ended(s);
	if (got == -1)			/* AUTH cannot go on after that */
		return auth ? session_end(s, S_LINGER) : 1;
	if (auth) {
		/* A response, whatever it looks like; it may be a password. */
		slog(s, LOG_DEBUG, "CLIENT < ***");
		slog(s, LOG_DEBUG, "SERVER > ***");
		line_relay(s, line, n);
	} else
		command(s, line, n);
	buf_eat(&s->client.in, 0);
	return 1;
}

/*
 * REPLY.
 */

static int
command_reply(struct session *s, const struct reply *r)
{
	int auth = verb_is(r->verb, "AUTH") && r->code == 334;

	if (r->class == 3 && !auth)
		return server_lost(s, "unexpected 3xx reply");
	if (r->verb->on_reply != NULL && r->verb->on_reply(s, r))
		return 1;
	if (verb_is(r->verb, "QUIT") || r->code == 421)
		return relay_and_close(s, r);
	relay(s, r);
	if (auth)
		s->server.verb = r->verb;	/* AUTH goes on */
	return enter(s, auth ? S_AUTH : S_COMMAND);
}

static int
st_reply(struct session *s)
{
	return s->client.err ? client_ended(s) : await_reply(s, command_reply);
}

/*
 * The spool.  Pieces of the message are gathered as pointers into the read
 * buffer and written by one call, after the scan line.  spool_flush() must be
 * called before the read buffer is eaten.
 */

static struct iovec gather[256];	/* the first is the scan line's */
static int ngather = 1;

static void
spool_flush(struct session *s)
{
	struct iovec *v = s->msg.spool.size == 0 ? gather : gather + 1;
	int n = gather + ngather - v;

	gather[0].iov_base = (char *)(uintptr_t)scan_line;
	gather[0].iov_len = scan_line_len;
	ngather = 1;
	if (n > 0 && s->result.outcome == OUT_NONE &&
	    spool_write(&s->msg.spool, v, n) == -1)
		fail_message_errno(s, "TempDirectory");
}

/*
 * Find the end of the header section: the first line that is neither a header
 * field nor a continuation line.  mbox lines (From_, quoted or not) may precede
 * the section, since Postfix treats them as headers there.
 */
static void
header_scan(struct message *m, const char *p, size_t n)
{
	off_t at = m->size;

	for (; n > 0 && m->header_state != H_DONE; p++, n--, at++)
		switch (m->header_state) {
		case H_FIRST:
			m->top = m->header_end = at;
			m->matched = *p == 'F';
			m->indented = *p == ' ' || *p == '\t';
			m->header_state = *p == 'F' || *p == '>' ? H_FROM :
			    is_name_char(*p) ? H_NAME : H_DONE;
			break;
		case H_MBOX:
			if (*p == '\n')
				m->header_state = H_FIRST;
			break;
		case H_LINE:
			if (*p == ' ' || *p == '\t') {
				m->header_state = H_REST;
				break;
			}
			m->header_end = at;
			m->header_state = is_name_char(*p) ? H_NAME : H_DONE;
			break;
		case H_FROM:
			if (*p == '>' && m->matched == 0)
				break;
			if (*p == "From "[m->matched]) {
				if (++m->matched == 5)
					m->header_state = H_MBOX;
				break;
			}
			m->header_state = H_NAME;
			/* FALLTHROUGH */
		case H_NAME:
			if (is_name_char(*p))
				break;
			/* FALLTHROUGH */
		case H_BLANK:
			m->header_state = *p == ':' ? H_REST :
			    *p == ' ' || *p == '\t' ? H_BLANK : H_DONE;
			break;
		case H_REST:
			if (*p == '\n')
				m->header_state = H_LINE;
			break;
		case H_DONE:
			break;
		}
}

static void
spool_append(struct session *s, const char *p, size_t n)
{
	struct iovec *last = &gather[ngather - 1];
	int64_t limit = size_limit(s);

	if (s->result.outcome != OUT_NONE || n == 0)
		return;
	if (limit > 0 && s->msg.size + (int64_t)n > limit) {
		fail_message(s, OUT_OVERSIZE, r_too_big, (long long)limit);
		return;
	}
	if (s->msg.header_state != H_DONE)
		header_scan(&s->msg, p, n);
	s->msg.size += n;
	if (ngather > 1 && (char *)last->iov_base + last->iov_len == p) {
		last->iov_len += n;
		return;
	}
	gather[ngather].iov_base = (char *)(uintptr_t)p;
	gather[ngather].iov_len = n;
	if (++ngather == (int)(sizeof gather / sizeof gather[0]))
		spool_flush(s);
}

#define BLOCKSZ		32
#define MAXPENDING	(1 << 24)	/* held CRs or NULs: written at once */
static const char crlf[] = "\r\n", nuls[BLOCKSZ], spaces[] =
    "                                ";

/* Append the CRs or NULs that were held back. */
static void
spool_append_held(struct session *s, const char *block)
{
	size_t n;

	for (; s->msg.held_bytes > 0; s->msg.held_bytes -= n) {
		n = s->msg.held_bytes < BLOCKSZ ? s->msg.held_bytes : BLOCKSZ;
		spool_append(s, block, n);
	}
}

/* Returns the first CR or LF of p .. stop, or stop.  This is the hottest loop,
 * so it tests eight bytes at a time.  The test marks bytes below 14.  A borrow
 * may mark later bytes as well, so the byte is tested again. */
static const char *
line_end(const char *p, const char *stop)
{
	const uint64_t ones = UINT64_MAX / 255, tops = ones << 7;
	uint64_t word;

	while (stop - p >= 8) {
		memcpy(&word, p, 8);
		word = le64toh(word);
		word = (word - ones * 14) & ~word & tops;
		if (word == 0) {
			p += 8;
			continue;
		}
		p += __builtin_ctzll(word) / 8;
		if (*p == '\r' || *p == '\n')
			return p;
		p++;
	}
	while (p < stop && *p != '\r' && *p != '\n')
		p++;
	return p;
}

/* Returns the first position of p .. stop that needs the automaton: a bare CR
 * or LF, or a CRLF whose next byte is a dot, a NUL, or not received yet. */
static const char *
plain_text(const char *p, const char *stop)
{
	for (;;) {
		p = line_end(p, stop);
		if (stop - p < 3 || p[0] != '\r' || p[1] != '\n' ||
		    p[2] == '.' || p[2] == '\0')
			return p;
		p += 2;
	}
}

/*
 * Promise 3, the body filter: from the bytes that the client sends after 354 to
 * the bytes of the spool, in which each line ends in CRLF and contains no other
 * CR or LF.  A next hop that accepted another line end could read a second end of
 * data in the body (SMTP smuggling, CVE-2023-51764).
 *
 *	CRLF.CRLF	end of data: *end is set to 1; nothing else is
 *	CRLF.		the dot was stuffed and is removed, but not after a bare
 *			LF, which is no line end to the client
 *	CR...CRLF	CRLF
 *	LF		CRLF
 *	CR		a space; a line end would let a sender add headers
 *	NUL...dot	at the start of a line: the dot alone, since some next hops
 *			drop NULs, and others end a line at a NUL
 *
 * Returns the number of bytes that it took from p: n, or fewer when *end is 1.
 * With s->msg.in_bdat dots have no meaning, and there is no end of data.
 */
static size_t
body_filter(struct session *s, const char *p, size_t n, int *end)
{
	struct message *m = &s->msg;
	const char *q = p, *stop = p + n, *run;

	*end = 0;
	while (q < stop)
		switch (m->body_state) {
		case BOL:		/* at the start, or after CRLF */
			m->body_state = LINE;
			if (*q == '.' && !m->in_bdat) {
				m->body_state = BOL_DOT;
				q++;
			}
			break;
		case BOL_DOT:
			m->body_state = LINE;
			if (*q == '\r') {
				m->body_state = BOL_DOT_CR;
				q++;
			}
			break;
		case BOL_DOT_CR:
			if (*q == '\n') {
				m->body_state = BOL;
				*end = 1;
				return q + 1 - p;
			}
			m->held_bytes = 1;
			m->body_state = CRS;
			break;
		case LINE:		/* at the first byte; NULs are held */
			if (*q == '\0') {
				m->held_bytes++;
				q++;
				break;
			}
			if (*q == '.') {
				m->held_bytes = 0;
				m->has_dot_lines = 1;
			}
			spool_append_held(s, nuls);
			m->body_state = TEXT;
			break;
		case TEXT:
			run = plain_text(q, stop);
			spool_append(s, q, run - q);
			q = run;
			if (q == stop)
				break;
			if (*q++ == '\n') {
				spool_append(s, crlf, 2);
				m->body_state = LINE;
			} else {
				m->held_bytes = 1;
				m->body_state = CRS;
			}
			break;
		case CRS:		/* after CRs, which are held */
			if (*q == '\n') {
				m->held_bytes = 0;
				spool_append(s, crlf, 2);
				m->body_state = BOL;
				q++;
			} else if (*q == '\r') {
				m->held_bytes++;
				q++;
			} else {
				spool_append_held(s, spaces);
				m->body_state = TEXT;
			}
			break;
		}
	if (m->held_bytes > MAXPENDING)
		fail_message(s, OUT_ERROR, r_flood);
	return q - p;
}

/* The message is complete.  DATA ends with nothing held, BDAT LAST may not. */
static void
body_end(struct session *s)
{
	struct message *m = &s->msg;

	if (m->held_bytes > 0) {
		spool_append_held(s, m->body_state == CRS ? spaces : nuls);
		m->body_state = TEXT;
	}
	/* DATA can express complete lines only. */
	if (m->body_state == TEXT)
		spool_append(s, crlf, 2);
	spool_flush(s);
	if (m->header_state == H_FIRST)
		m->top = m->size;
	if (m->header_state == H_FIRST || m->header_state == H_LINE)
		m->header_end = m->size;
}

/*
 * BODY.
 */

static void
message_begin(struct session *s)
{
	if (s->conf->keepalives > 0)
		s->server.noop_at = now + s->conf->keepalives;
	if (spool_open(&s->msg.spool, s->conf->tempdir,
	    s->conf->debug_files) == -1)
		fail_message_errno(s, "TempDirectory");
}

static int
enter_body(struct session *s, enum state state)
{
	s->msg.rate_check_at = now + s->conf->timeout;
	s->msg.rate_bytes = 0;
	return enter(s, state);
}

static int
has_recipients(const struct session *s)
{
	return s->env.have_mail && s->env.nrcpt > 0;
}

static int
data_command(struct session *s, char *line)
{
	if (line[4 + strspn(line + 4, " \t")] != '\0')
		return refuse(s, r_no_args);
	if (!has_recipients(s))
		return refuse(s, r_no_rcpt);
	message_begin(s);
	client_reply(s, r_ready);
	return enter_body(s, S_BODY);
}

static int
message_end(struct session *s)
{
	int64_t max = scan_limit(s);

	s->msg.dot_at = now;
	if (s->result.outcome == OUT_NONE)
		body_end(s);
	if (s->result.outcome != OUT_NONE)
		return reject_message(s);
	enter(s, S_SCAN);
	s->deadline = s->msg.dot_at + s->conf->scantimeout;
	if ((max > 0 && s->msg.size > max) || s->msg.size > MAXSTREAM)
		s->result.verdict = TOOBIG;
	else
		clamd_begin(s);
	return 1;
}

static int
st_body(struct session *s)
{
	struct buf *in = &s->client.in;
	size_t n;
	int end = 0;

	if (server_idle(s) == GONE)
		fail_server_lost(s);
	if (!client_ready(s))
		return 0;
	if (buf_len(in) > 0) {
		n = body_filter(s, buf_head(in), buf_len(in), &end);
		spool_flush(s);
		buf_eat(in, n);
		return end ? message_end(s) : 1;
	}
	return s->client.eof && abort_transaction(s);
}

/*
 * CHUNK: a chunk of BDAT (RFC 3030).  It is stored unchanged if the next hop
 * accepts BDAT.
 */

static int
bdat_command(struct session *s, char *line)
{
	char *p = line + 4 + strspn(line + 4, " \t");
	int64_t size, limit = size_limit(s);
	int last, valid = parse_number(p, " \t", &size) == 1;

	p += strcspn(p, " \t");
	p += strspn(p, " \t");
	last = strcasecmp(p, "LAST") == 0;
	/* The start of the next command would be unknown. */
	if (!valid || (*p != '\0' && !last))
		return hang_up(s, r_bad_size);
	if (!s->msg.in_bdat && has_recipients(s))
		message_begin(s);
	s->msg.in_bdat = 1;
	s->msg.relay_bdat = s->server.chunking;
	s->msg.chunk_left = size;
	s->msg.chunk_last = last;
	if (limit > 0 && size > limit - s->msg.size && has_recipients(s))
		fail_message(s, OUT_OVERSIZE, r_too_big, (long long)limit);
	return enter_body(s, S_CHUNK);
}

/* A refused chunk ends the transaction, so further chunks get 503. */
static int
chunk_end(struct session *s)
{
	if (has_recipients(s)) {
		if (s->result.outcome != OUT_NONE || s->msg.chunk_last)
			return message_end(s);
		client_reply(s, r_chunk, (unsigned long long)s->msg.size);
		return enter(s, S_COMMAND);
	}
	message_reset(&s->msg);
	if (s->server.peer.fd == -1 && !s->rejected) {
		client_reply(s, r_server_lost, s->server.why);
		return session_end(s, S_LINGER);
	}
	enter(s, S_COMMAND);
	return refuse(s, r_no_rcpt);
}

/* Without accepted recipients the chunk is discarded. */
static int
st_chunk(struct session *s)
{
	struct buf *in = &s->client.in;
	size_t n = buf_len(in);
	int end;

	if (server_idle(s) == GONE && has_recipients(s))
		fail_server_lost(s);
	if (!client_ready(s))
		return 0;
	if (s->msg.chunk_left == 0)	/* commands must wait for a NOOP */
		return s->server.verb == NULL && chunk_end(s);
	if (n == 0)
		return s->client.eof && abort_transaction(s);
	if (n > s->msg.chunk_left)
		n = s->msg.chunk_left;
	if (has_recipients(s)) {
		if (s->msg.relay_bdat)
			spool_append(s, buf_head(in), n);
		else
			body_filter(s, buf_head(in), n, &end);
		spool_flush(s);
	}
	s->msg.chunk_left -= n;
	buf_eat(in, n);
	return 1;
}

/*
 * SCAN: and the actions that follow from the verdict.
 */

static const char *
rfc5322_date(void)
{
	static const char day[] = "SunMonTueWedThuFriSat";
	static const char month[] = "JanFebMarAprMayJunJulAugSepOctNovDec";
	static char text[64];
	time_t t = time(NULL);
	struct tm tm;

	gmtime_r(&t, &tm);
	format(text, sizeof text, "%.*s, %d %.*s %d %02d:%02d:%02d +0000", 3,
	    day + tm.tm_wday * 3, tm.tm_mday, 3, month + tm.tm_mon * 3,
	    tm.tm_year + 1900, tm.tm_hour, tm.tm_min, tm.tm_sec);
	return text;
}

/* Append a header with its % sequences replaced and, for DATA, its dots
 * stuffed.  Returns 0, or -1 without memory. */
static int
expand(struct str *to, const struct session *s, const char *fmt)
{
	const char *v;

	for (; *fmt != '\0'; fmt++) {
		if (*fmt == '.' && !s->msg.relay_bdat &&
		    (to->len == 0 || to->s[to->len - 1] == '\n') &&
		    str_add(to, ".", 1) == -1)
			return -1;
		v = *fmt != '%' ? NULL :
		    fmt[1] == 'i' ? addr_text(&s->client_addr) :
		    fmt[1] == 'l' ? addr_text(&s->local_addr) :
		    fmt[1] == 'd' ? rfc5322_date() :
		    fmt[1] == '%' ? "%" : NULL;
		if (str_add(to, v != NULL ? v : fmt,
		    v != NULL ? strlen(v) : 1) == -1)
			return -1;
		fmt += v != NULL;
	}
	return str_add(to, crlf, 2);
}

/* Build the header that goes into the message.  Returns 0, or -1 without
 * memory. */
static int
choose_header(struct session *s)
{
	const char *h = s->conf->header;
	char own[NAMESZ + 64];
	size_t n;

	if (s->result.verdict == CLEAN)
		return h == NULL ? 0 : expand(&s->replay.header, s, h);
	if (s->result.verdict == VIRUS)
		n = format(own, sizeof own, "X-Virus-Infected: %s", s->result.text);
	else
		n = format(own, sizeof own, "X-Virus-Unscanned: %s",
		    s->result.verdict == TOOBIG ? "message too big" :
		    s->result.text);
	ascii_clean(own, n, " ", '?');
	return str_add(&s->replay.header, own, n) == -1 ||
	    str_add(&s->replay.header, crlf, 2) == -1 ? -1 : 0;
}

/* Find the place of our header.  A first line that begins with a blank would
 * continue it, so an empty line separates them.  Returns 0, or -1 without memory. */
static int
place_header(struct session *s)
{
	s->replay.header_off = s->replay.header.len >= 9 &&
	    strncasecmp(s->replay.header.s, "Received:", 9) == 0 ?
	    s->msg.top : s->msg.header_end;
	return s->msg.indented && s->replay.header.len > 0 ?
	    str_add(&s->replay.header, crlf, 2) : 0;
}

static int
forward(struct session *s)
{
	if (choose_header(s) == 0 && place_header(s) == 0)
		return enter(s, S_DATA);
	errno = ENOMEM;
	fail_message_errno(s, "header");
	return reject_message(s);
}

/* Promise 8: append a variable for the VirusAction, its name and its value, each
 * with a NUL.  Bytes that are not text become question marks, except sep, which
 * separates values.  Returns 0, or -1 without memory. */
static int
env_add(struct str *env, const char *name, const char *value, char sep)
{
	size_t len, n;
	char *v;

	if (value == NULL)
		value = "";
	n = strlen(value);
	if (n > 0 && value[n - 1] == sep)
		n--;
	if (str_add(env, name, strlen(name) + 1) == -1 ||
	    str_add(env, value, n) == -1 || str_add(env, "", 1) == -1)
		return -1;
	for (v = env->s + env->len - n - 1; *v != '\0'; v += len)
		if ((len = text_char(v, strlen(v))) == 0) {
			len = 1;
			if (*v != sep)
				*v = '?';
		}
	return 0;
}

/* Returns our nine variables for virusaction_start(), or NULL without memory. */
static char *
virus_env(struct session *s)
{
	struct str env = { NULL, 0, 0 };

	if (env_add(&env, "CLIENT", addr_text(&s->client_addr), 0) == 0 &&
	    env_add(&env, "EMAIL", s->result.quarantined.s, 0) == 0 &&
	    env_add(&env, "RECIPIENTS", s->env.rcpt_list.s, '\n') == 0 &&
	    env_add(&env, "REMOTE", s->xforward.addr.s, 0) == 0 &&
	    env_add(&env, "REMOTE_HELO", s->xforward.helo.s, 0) == 0 &&
	    env_add(&env, "SENDER", s->env.from.s, 0) == 0 &&
	    env_add(&env, "SERVER", addr_text(&s->server.addr), 0) == 0 &&
	    env_add(&env, "TMPDIR", s->conf->tempdir, 0) == 0 &&
	    env_add(&env, "VIRUS", s->result.text, 0) == 0)
		return env.s;
	str_free(&env);
	return NULL;
}

/* Act on a virus, after the quarantine copy is on disk if one is wanted. */
static int
virus_found(struct session *s)
{
	char *env;

	if (s->conf->virusaction != NULL) {
		if ((env = virus_env(s)) == NULL)
			slog(s, LOG_ERR, "VirusAction: not run: %s: %s",
			    strerror(errno), printable(s->conf->virusaction,
			    strlen(s->conf->virusaction)));
		else
			virusaction_start(s->id, s->conf->virusaction, env,
			    s->conf->timeout);
	}
	if (s->result.action == PASS)
		return forward(s);
	if (s->result.action == BOUNCE)
		settle(s, OUT_VIRUS, r_virus_bounce, s->result.text);
	else
		settle(s, OUT_VIRUS, r_virus_drop);
	return reject_message(s);
}

/* A child made a copy, and the answer is its path, or the reason why not.  A
 * NUL follows the answer. */
static void
on_quarantined(void *ctx, const char *answer, size_t n)
{
	struct session *s = ctx;

	s->result.child = NULL;
	session_wake(s);
	if (*answer != '/')
		slog(s, LOG_ERR, "quarantine in %s: %s", s->conf->tempdir,
		    n > 0 ? answer : "the child process returned no result");
	else if (str_set(&s->result.quarantined, answer, n) == -1) {
		slog(s, LOG_ERR, "quarantine in %s:", s->conf->tempdir);
		unlink(answer);
	}
}

/* The verdict is known: forward the message, or act on it. */
static int
judge(struct session *s)
{
	struct result *r = &s->result;

	if (r->verdict == CLEAN || (r->verdict != VIRUS && s->conf->failopen))
		return forward(s);
	if (r->verdict == VIRUS) {
		r->action = conf_action(s->conf, r->text);
		return s->conf->quarantine ? enter(s, S_QUARANTINE) :
		    virus_found(s);
	}
	if (r->verdict == TOOBIG)
		settle(s, OUT_OVERSIZE, r_not_scanned, (long long)s->msg.size);
	else
		settle(s, OUT_CLAMD_ERROR, r_no_scan, r->text);
	return reject_message(s);
}

static int
st_scan(struct session *s)
{
	if (client_gone(s))
		return abort_transaction(s);
	if (server_idle(s) == GONE) {
		fail_server_lost(s);
		clamd_cancel(s);
		return reject_message(s);
	}
	if (s->result.verdict == UNKNOWN && !clamd_scan(s))
		return 0;
	return judge(s);
}

/*
 * QUARANTINE.
 */

/* Returns 1, or 0 when MAXCOPIES other copies are being made. */
static int
copy_start(struct session *s)
{
	s->result.child = spool_quarantine(&s->msg.spool, s->conf->tempdir,
	    on_quarantined, s, s->deadline - now);
	if (s->result.child == NULL && errno == EBUSY)
		return 0;
	if (s->result.child == NULL)
		slog(s, LOG_ERR, "quarantine in %s:", s->conf->tempdir);
	s->result.copying = 1;
	return 1;
}

/* The loss of the next hop does not matter: the virus is handled first. */
static int
st_quarantine(struct session *s)
{
	server_idle(s);
	if (!s->result.copying) {
		if (client_gone(s))
			return abort_transaction(s);
		if (!copy_start(s))
			return 0;
	}
	if (s->result.child != NULL)	/* wait, for each copy is logged */
		return 0;
	if (s->result.quarantined.len == 0) {
		/* Promise 1: without a copy the client keeps the message. */
		fail_message(s, OUT_ERROR, r_local, "quarantine",
		    "no copy could be made");
		return reject_message(s);
	}
	slog(s, LOG_NOTICE, "quarantined virus file as: %s",
	    s->result.quarantined.s);
	if (client_gone(s))
		return abort_transaction(s);
	return virus_found(s);
}

/*
 * DATA: the next hop is asked to take the message.
 */

/* Extend the deadline by TimeOut, but not past reply_deadline. */
static void
replay_extend(struct session *s)
{
	s->deadline = now + s->conf->timeout;
	if (s->deadline > s->replay.reply_deadline)
		s->deadline = s->replay.reply_deadline;
}

/* Allow 10 minutes from the end of data (RFC 5321 4.5.3.2.6), and TimeOut from
 * now if that is later. */
static int
begin_replay(struct session *s)
{
	enter(s, S_REPLAY);
	s->replay.reply_deadline = s->msg.dot_at + FINAL_TIME;
	if (s->replay.reply_deadline < s->deadline)
		s->replay.reply_deadline = s->deadline;
	return 1;
}

static int
data_reply(struct session *s, const struct reply *r)
{
	if (r->code == 354) {
		s->server.verb = r->verb;	/* the final reply is due */
		return begin_replay(s);
	}
	if (r->code < 400)
		return server_lost(s, "unexpected 3xx reply");
	log_refusal(s, r);
	settle_relay(s, r);
	if (r->code == 421)
		peer_close(&s->server.peer);
	return reject_message(s);
}

static int
st_data(struct session *s)
{
	char line[64];
	enum idle idle;

	if (verb_is(s->server.verb, "DATA"))
		return await_reply(s, data_reply);
	if (client_gone(s))
		return abort_transaction(s);
	if ((idle = server_idle(s)) == GONE) {
		fail_server_lost(s);
		return reject_message(s);
	}
	if (!s->msg.relay_bdat)
		return idle == READY && server_command(s, "DATA\r\n");
	format(line, sizeof line, "BDAT %lld LAST\r\n",
	    (long long)(s->msg.size + s->replay.header.len));
	return idle == READY && server_command(s, line) && begin_replay(s);
}

/*
 * REPLAY.
 */

/* The next hop replies before it has the whole message, and gets no more of it.
 * An early 4xx or 5xx is final.  An early 2xx or 3xx is a protocol error. */
static int
early_reply(struct session *s, const struct reply *r)
{
	if (r->code < 400)
		return server_lost(s, "early 2xx, before the end of the message");
	log_refusal(s, r);
	settle_relay(s, r);
	message_log(s);
	return relay_and_close(s, r);
}

/*
 * Copy up to TAIL bytes of the spool to server.peer.out.  A small message
 * leaves with its header and its end in one segment, as do the last bytes of a
 * large one.
 */
static int
replay_copy(struct session *s, off_t left)
{
	static char chunk[TAIL];
	struct buf *out = &s->server.peer.out;
	const char *p, *stop, *nl;
	ssize_t n = left < TAIL ? left : TAIL;

	if (!buf_ready(out, 2 * TAIL))		/* each byte may be a dot */
		return 0;
	n = spool_read(&s->msg.spool, chunk, n, scan_line_len + s->replay.off);
	if (n <= 0)
		return server_lost(s, "cannot read TempDirectory");
	s->replay.off += n;
	if (!s->msg.has_dot_lines) {
		buf_put(out, chunk, n);
		return 1;
	}
	/* Promise 3: stuff dots. */
	for (p = chunk, stop = chunk + n; p < stop; p = nl) {
		if (*p == '.' && s->replay.at_bol)
			buf_put(out, ".", 1);
		nl = memchr(p, '\n', stop - p);
		s->replay.at_bol = nl != NULL;
		nl = nl != NULL ? nl + 1 : stop;
		buf_put(out, p, nl - p);
	}
	return --s->io_budget > 0;
}

static int
replay_file(struct session *s, off_t left)
{
	off_t at = scan_line_len + s->replay.off;
	int r;

	if (buf_len(&s->server.peer.out) > 0)
		return 0;
	r = peer_sendfile(&s->server.peer, s->msg.spool.fd, &at, left);
	if (at != (off_t)scan_line_len + s->replay.off)
		replay_extend(s);
	s->replay.off = at - scan_line_len;
	return r && --s->io_budget > 0;
}

/*
 * Check both peers once more before the last bytes leave.  Promise 1: the
 * message of a client that has gone must not be delivered, and a reply that is
 * here cannot be the reply to them.
 */
static void
recheck_peers(struct session *s)
{
	if (!s->client.eof)
		client_fill(s);
	peer_reset(&s->client);
	if (!s->server.peer.eof && peer_peek(&s->server.peer) != 0)
		s->server.peer.err = 1;
}

/* Returns 1 when the last bytes are in server.peer.out, else 0. */
static int
replay_queued(const struct session *s)
{
	return s->replay.header_queued && s->replay.off == s->msg.size &&
	    (s->msg.relay_bdat || s->replay.dot_queued);
}

/* Queue the next piece: message, our header, or the end of data.  Returns 1,
 * or 0 when there is no room for it now. */
static int
replay_next(struct session *s)
{
	struct buf *out = &s->server.peer.out;
	off_t stop = s->replay.header_queued ? s->msg.size :
	    s->replay.header_off;
	off_t left = stop - s->replay.off;

	if (left > TAIL && s->msg.spool.mem == NULL && !s->msg.has_dot_lines)
		return replay_file(s, left - TAIL);
	if (left > 0)
		return replay_copy(s, left);
	if (s->replay.header_queued)
		return s->replay.dot_queued = server_put(s, ".\r\n");
	if (!buf_ready(out, s->replay.header.len))
		return 0;
	buf_put(out, s->replay.header.s, s->replay.header.len);
	return s->replay.header_queued = 1;
}

static int
st_replay(struct session *s)
{
	int queued = replay_queued(s);

	if (queued && buf_len(&s->server.peer.out) == 0 &&
	    !s->server.peer.err) {
		enter(s, S_FINAL);
		s->deadline = s->replay.reply_deadline;
		return 1;
	}
	if (queued)
		recheck_peers(s);
	if (client_gone(s))
		return abort_transaction(s);
	/* After a failed write the reason may be here, or still unread. */
	if (s->server.peer.err == PEER_LOCAL || (s->server.peer.err &&
	    !server_input(s) && !peer_fill(&s->server.peer, 0)))
		return server_lost(s, s->server.peer.err == PEER_LOCAL ?
		    "no memory, or TempDirectory cannot be read" : "write failed");
	if (server_input(s)) {
		s->server.peer.err = 1;	/* send nothing more */
		return await_reply(s, early_reply);
	}
	return !queued && replay_next(s);
}

/*
 * FINAL: the next hop has the whole message.  Its reply is awaited and
 * logged even if the client has gone.
 */

static int
final_reply(struct session *s, const struct reply *r)
{
	if (r->class == 3)
		return server_lost(s, "unexpected 3xx reply");
	settle_relay(s, r);
	message_log(s);
	if (r->class != 2)
		log_refusal(s, r);
	return message_done(s, r->code != 421);
}

static int
st_final(struct session *s)
{
	return await_reply(s, final_reply);
}

/*
 * RESET: the next hop forgets the transaction, then the client gets the reply.
 */

static int
reset_reply(struct session *s, const struct reply *r)
{
	return message_done(s, r->class == 2);
}

static int
st_reset(struct session *s)
{
	enum idle idle;

	if (s->client.err)
		return session_end(s, S_DEAD);
	if (verb_is(s->server.verb, "RSET"))
		return await_reply(s, reset_reply);
	if (!client_ready(s))
		return 0;
	if ((idle = server_idle(s)) == GONE)
		return message_done(s, 0);
	return idle == READY && server_command(s, "RSET\r\n");
}

/*
 * LINGER: to close a socket with unread input sends a RST, which can destroy
 * our last reply.
 */

static int
st_linger(struct session *s)
{
	if (s->client.err || (s->shut && s->client.eof))
		return session_end(s, S_DEAD);
	buf_free(&s->client.in);
	if (s->shut || buf_len(&s->client.out) > 0)
		return 0;
	s->shut = 1;
	shutdown(s->client.fd, SHUT_WR);
	s->deadline = now + LINGER_TIME;
	return 1;
}

/*
 * The table of the states, deadlines, and the work of one iteration of the
 * loop.
 */

enum {
	CLIENT = 1, SERVER = 2, CLAMD = 4,	/* the state reads from it */
	RESET = 8,	/* only a reset of the client's connection is noticed */
	IDLE = 16	/* its TimeOut begins again when the client reads */
};

/* A step returns 1 when it made progress and is to be called again (the state
 * may be another one), 0 when the session must wait. */
static const struct {
	char	 name[12];
	int	 flags;
	int	(*step)(struct session *);
} states[] = {
	[S_PROXY] =	{ "proxy", CLIENT, st_proxy },
	[S_CONNECT] =	{ "connect", CLIENT | RESET, st_connect },
	[S_GREETING] =	{ "greeting", CLIENT | SERVER | RESET, st_greeting },
	[S_COMMAND] =	{ "command", CLIENT | SERVER | IDLE, st_command },
	[S_REPLY] =	{ "reply", SERVER | RESET, st_reply },
	[S_AUTH] =	{ "auth", CLIENT | SERVER | IDLE, st_command },
	[S_BODY] =	{ "body", CLIENT | SERVER | IDLE, st_body },
	[S_CHUNK] =	{ "chunk", CLIENT | SERVER | IDLE, st_chunk },
	[S_SCAN] =	{ "scan", CLIENT | SERVER | CLAMD, st_scan },
	[S_QUARANTINE] = { "quarantine", CLIENT | SERVER, st_quarantine },
	[S_DATA] =	{ "data", CLIENT | SERVER, st_data },
	[S_REPLAY] =	{ "replay", CLIENT | SERVER, st_replay },
	[S_FINAL] =	{ "final", SERVER, st_final },
	[S_RESET] =	{ "reset", SERVER | RESET, st_reset },
	[S_LINGER] =	{ "linger", CLIENT, st_linger },
	[S_DEAD] =	{ "dead", 0, NULL },
};

static void
timed_out(struct session *s)
{
	slog(s, LOG_DEBUG, "%s: time is up", states[s->state].name);
	switch (s->state) {
	case S_CONNECT:			/* st_connect() checks it */
		break;
	case S_PROXY:
		s->client.eof = 1;	/* read no more of it */
		break;
	case S_COMMAND:
	case S_AUTH:
	case S_BODY:
	case S_CHUNK:
		slog(s, LOG_WARNING, "CLIENT: network read operation timed out%s",
		    bare_lf(s));
		hang_up(s, r_idle);
		break;
	case S_SCAN:
		clamd_timeout(s);
		s->result.verdict = FAILED;
		break;
	case S_QUARANTINE:
		slog(s, LOG_ERR, "quarantine in %s: no copy was %s within TimeOut",
		    s->conf->tempdir, s->result.copying ? "made" : "begun");
		s->result.copying = 1;	/* st_quarantine() finds no copy */
		copy_forget(&s->result);
		break;
	case S_LINGER:
		session_end(s, S_DEAD);
		break;
	default:
		server_lost(s, "no reply in time");
	}
}

/* Time out a body that comes at less than SLOWEST_BODY over TimeOut. */
static void
rate_check(struct session *s)
{
	if (!is_body(s) || now < s->msg.rate_check_at)
		return;
	if (s->msg.rate_bytes <
	    (uint64_t)(s->conf->timeout / SECOND) * SLOWEST_BODY)
		timed_out(s);
	s->msg.rate_check_at = now + s->conf->timeout;
	s->msg.rate_bytes = 0;
}

/* Write both buffers.  Returns 1 when that made room, else 0. */
static int
flush(struct session *s)
{
	size_t c = buf_len(&s->client.out), h = buf_len(&s->server.peer.out);
	int more = s->state == S_REPLAY && !replay_queued(s);

	if (c > 0)
		peer_drain(&s->client, 0);
	if (h > 0)
		peer_drain(&s->server.peer, more);
	if (buf_len(&s->client.out) == c && buf_len(&s->server.peer.out) == h)
		return 0;
	if ((states[s->state].flags & IDLE) && buf_len(&s->client.out) < c)
		s->deadline = now + s->conf->timeout;
	if (s->state == S_REPLAY)
		replay_extend(s);
	return 1;
}

/* Run the session until it must wait. */
static void
session_run(struct session *s)
{
	s->ran_at = now;
	session_activate(s);
	s->io_budget = 4;
	if (now >= s->deadline && s->state != S_DEAD)
		timed_out(s);
	rate_check(s);
	do {
		while (s->state != S_DEAD && states[s->state].step(s))
			;
	} while (s->state != S_DEAD && flush(s) && s->io_budget > 0);
	session_rest(s);
	if (peer_settle(&s->client) + peer_settle(&s->server.peer) +
	    peer_settle(&s->scan.peer) != 0 && s->state != S_DEAD) {
		slog(s, LOG_ERR, "out of memory: session ends");
		session_end(s, S_DEAD);
	}
}

static void
on_client(void *arg, int revents)
{
	struct session *s = arg;
	size_t had = buf_len(&s->client.in);

	if (s->state == S_DEAD)
		return;
	if ((revents & POLLIN) && client_fill(s) &&
	    buf_len(&s->client.in) > had) {
		s->msg.rate_bytes += buf_len(&s->client.in) - had;
		if (is_body(s))
			s->deadline = now + s->conf->timeout;
	}
	if ((states[s->state].flags & RESET) && (revents & POLLERR))
		peer_reset(&s->client);
	session_run(s);
}

static void
on_peer(struct session *s, struct peer *p, int revents)
{
	if (s->state == S_DEAD || p->fd == -1)
		return;
	if (p->connecting)
		p->connecting = 0;
	else if (revents & POLLIN)
		peer_fill(p, 0);
	session_run(s);
}

static void
on_server(void *arg, int revents)
{
	struct session *s = arg;

	on_peer(s, &s->server.peer, revents);
}

static void
on_clamd(void *arg, int revents)
{
	struct session *s = arg;

	on_peer(s, &s->scan.peer, revents);
}

static int
wants(const struct session *s, const struct peer *p, int who)
{
	int events = 0;

	if ((states[s->state].flags & who) && !p->eof &&
	    buf_len(&p->in) < BUFSZ)
		events |= POLLIN;
	if (buf_len(&p->out) > 0 || p->connecting)
		events |= POLLOUT;
	return events;
}

static void
sooner(struct session *s, int64_t t)
{
	if (t != 0 && t < s->next_time)
		s->next_time = t;
}

/* Add the session's descriptors and its earliest deadline to the poll set. */
static void
session_poll(struct session *s)
{
	int client = wants(s, &s->client, CLIENT);
	int server = wants(s, &s->server.peer, SERVER);
	int clamd = wants(s, &s->scan.peer, CLAMD);
	/* Not for a unix socket, of which poll() reports EOF in the same way,
	 * again and again. */
	int reset = (states[s->state].flags & RESET) &&
	    s->peer_addr.u.sa.sa_family != AF_UNIX;

	/* What sendfile(2) is to send is in no buffer. */
	if (s->state == S_REPLAY && buf_len(&s->server.peer.in) == 0)
		server |= POLLOUT;
	if (s->scan.phase == SC_SEND)
		clamd |= POLLOUT;
	if (client != 0 || reset)
		poll_add(s->client.fd, client, on_client, s);
	if (server != 0)
		poll_add(s->server.peer.fd, server, on_server, s);
	if (clamd != 0)
		poll_add(s->scan.peer.fd, clamd, on_clamd, s);
	s->next_time = s->deadline;
	sooner(s, s->scan.deadline);
	if (is_body(s))
		sooner(s, s->msg.rate_check_at);
	sooner(s, keep_alive_at(s));
	poll_deadline(s->next_time);
}

/* End the session if at_once is set, or if it has no mail under way and has not
 * run for idle_time. */
static void
session_shutdown(struct session *s, int64_t idle_time, int at_once)
{
	int idle = 0;

	switch (s->state) {
	case S_PROXY:
	case S_CONNECT:
	case S_GREETING:
	case S_AUTH:
	case S_COMMAND:
		idle = !s->env.have_mail && now - s->ran_at >= idle_time;
		/* FALLTHROUGH */
	default:
		if (idle || at_once)
			hang_up(s, r_stopping);
		break;
	case S_DATA:
	case S_REPLAY:
	case S_FINAL:
	case S_RESET:
		if (at_once)
			server_lost(s, "no reply before shutdown");
		break;
	case S_LINGER:
	case S_DEAD:
		if (at_once)
			session_end(s, S_DEAD);
	}
	if (s->state != S_LINGER && s->state != S_DEAD)
		return;
	session_run(s);
	/* A client that does not close its connection must not delay the end. */
	if (s->deadline > now + STOP_LINGER_TIME)
		s->deadline = now + STOP_LINGER_TIME;
}

/* Returns a new session for the socket fd, or NULL without memory. */
static struct session *
session_new(int fd, const struct addr *peer, struct conf *conf, unsigned id)
{
	struct session *s = calloc(1, sizeof *s);
	int one = 1;

	if (s == NULL)
		return NULL;
	s->id = id;
	s->conf = conf;
	conf->refs++;
	s->client.fd = fd;
	s->server.peer.fd = s->scan.peer.fd = s->msg.spool.fd = -1;
	transaction_end(s);
	s->peer_addr = s->client_addr = *peer;
	s->local_addr.len = sizeof s->local_addr.u;
	if (getsockname(fd, &s->local_addr.u.sa, &s->local_addr.len) == -1)
		s->local_addr.len = 0;
	addr_unmap(&s->local_addr);
	s->xclient_state = conf->xclient ? XC_WANTED : XC_DONE;
	if (conf->transparent)
		original_target(fd, &s->local_addr, &s->server.addr);
	if (peer->u.sa.sa_family != AF_UNIX)
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	enter(s, S_PROXY);
	s->deadline = now + PROXY_TIME;
	return s;
}

/* Send one line to a client that gets no session, and close fd. */
static void
session_refuse(int fd)
{
	char line[NOTESZ];
	int i, n = format(line, sizeof line, "%s\r\n", r_busy);

	send(fd, line, n, MSG_NOSIGNAL | MSG_DONTWAIT);
	shutdown(fd, SHUT_WR);
	/* Unread input would turn the close into a RST. */
	for (i = 0; i < 64; i++)
		if (recv(fd, line, sizeof line, MSG_DONTWAIT) <= 0)
			break;
	close(fd);
}

static void
session_free(struct session *s)
{
	session_end(s, S_DEAD);
	session_rest(s);
	str_free(&s->helo);
	peer_close(&s->client);
	conf_put(s->conf);
	free(s);
}

/* Make room for one more session.  Returns 0, or -1 without memory. */
static int
table_reserve(void)
{
	int size = table.size * 2 + 64;
	struct session **v;

	if (table.n < table.size)
		return 0;
	if ((v = realloc(table.v, size * sizeof *v)) == NULL)
		return -1;
	table.v = v;
	table.size = size;
	return 0;
}

void
session_accept(int fd, const struct addr *a, struct conf *conf)
{
	static unsigned id = FIRST_ID - 1;
	struct session *s = NULL;

	if (++id > 0xFFFFFF)
		id = FIRST_ID;
	if (table.n >= conf->maxconn)
		logmsg(LOG_WARNING, "%06X: refused %s: MaxConnections (%d) "
		    "reached", id, addr_text(a), (int)conf->maxconn);
	else if (table_reserve() == -1 ||
	    (s = session_new(fd, a, conf, id)) == NULL)
		logmsg(LOG_ERR, "refused %s:", addr_text(a));
	if (s == NULL) {
		count.refused++;
		session_refuse(fd);
		return;
	}
	s->index = table.n;
	table.v[table.n++] = s;
	session_activate(s);
	count.sessions++;
	count.open = table.n;
	if (count.open > count.most_open)
		count.most_open = count.open;
	session_wake(s);
}

/* How many of the sessions this pass is for. */
static int
npolled(void)
{
	return table.full ? table.n : table.nactive;
}

void
sessions_poll(int in_vain)
{
	struct session *s;
	int i;

	table.full = (in_vain && !table.full) || run_all ||
	    table.n - table.nactive < MANY_IDLE ||
	    now - table.full_at >= IDLE_POLL;
	if (table.full)
		table.full_at = now;
	else
		poll_deadline(now + 1);
	for (i = npolled(); i-- > 0;) {
		s = table.v[i];
		session_poll(s);
		if (now - s->ran_at >= ACTIVE_TIME || s->scan.phase == SC_QUEUE)
			session_idle(s);
	}
}

void
sessions_run(void)
{
	struct session *s;
	int i, n = run_all ? table.n : npolled();

	for (i = 0; i < n; i++)
		if (run_all || now >= table.v[i]->next_time)
			session_wake(table.v[i]);
	run_all = 0;
	/* The bound: sessions that wake each other do not keep out poll(). */
	for (i = table.n; i > 0 && (s = runnable) != NULL; i--)
		session_run(s);
}

void
sessions_shutdown(int64_t idle_time, int at_once)
{
	int i;

	for (i = 0; i < table.n; i++)
		session_shutdown(table.v[i], idle_time, at_once);
}

void
sessions_reap(void)
{
	struct session *s;
	int i;

	/* A session that has ended ran lately, so it is an active one. */
	for (i = table.nactive; i-- > 0;) {
		s = table.v[i];
		if (s->state == S_DEAD) {
			session_idle(s);
			table_move(s, --table.n);
			count.open = table.n;
			session_free(s);
		}
	}
}
