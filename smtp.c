/*
 * The life of a mail, from top to bottom.
 *
 *	PROXY	    who the client is, where a load balancer stands before us
 *	CONNECT	    to the next hop, as soon as the client is there
 *	GREETING    the next hop's, passed on under another name
 *	COMMAND	    one of the client's, when the one before has its reply
 *	REPLY	    to it, read whole, passed on whole
 *	AUTH	    a line of the client's that only the next hop understands
 *	BODY	    DATA: into the spool, up to the final dot
 *	CHUNK	    BDAT: so many bytes into the spool
 *	SCAN	    clamd looks at it
 *	QUARANTINE  a child keeps a copy of it
 *	DATA	    clamd called it OK: the next hop is asked to take it
 *	REPLAY	    header and body go out
 *	FINAL	    the next hop's word on it, which is the client's too
 *	RESET	    instead of the last three, for what is not forwarded
 *	LINGER	    the last reply is out, the client may read it in peace
 *
 * At most one command is outstanding at the next hop (and none beside a NOOP
 * of ours), so whose reply has come is never a question.
 *
 * Promise 4: no byte of a body reaches the next hop unless clamd has said OK, or
 * the administrator has said so: S_DATA is entered by forward() only, and that
 * is called by judge() and virus_found() only.
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

/* Linux; the kernel's number, for IPv4 and IPv6 alike. */
#define ORIGINAL_DST	80

#define OUR_NAME	"smtp.passthru"

#define PROXYSZ		2048		/* bytes of a PROXY header */
#define TAIL		(BUFSZ / 4)	/* bytes of a message, to copy them */

/* All that we ever say to a client of our own accord. */
static const char
    r_bye[] =		"221 2.0.0 Bye",
    r_ready[] =		"354 Start mail input; end with <CRLF>.<CRLF>",
    r_chunk[] =		"250 2.0.0 %llu octets received",
    r_virus_drop[] =	"250 2.0.0 Virus Detected; Discarded Email",
    r_virus_bounce[] =	"550 5.7.1 Virus Detected; Content Rejected (%s)",
    r_busy[] =		"421 4.3.2 Server busy, too many connections",
    r_stopping[] =	"421 4.3.2 Service shutting down",
    r_loop[] =		"421 4.4.6 Mail loop: this is a connection of our own",
    r_no_hop[] =	"421 4.4.1 Local Error (next mail server: %s)",
    r_hop_lost[] =	"421 4.4.2 Local Error (next mail server: %s)",
    r_hop_lost_mail[] =	"451 4.4.2 Local Error (next mail server: %s)",
    r_idle[] =		"421 4.4.2 Timeout, closing connection",
    r_too_many[] =	"421 4.7.0 Too many refused commands, closing connection",
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

/* The attributes of XCLIENT that we have values for. */
enum { X_NAME = 1, X_ADDR = 2, X_PORT = 4 };

static int st_proxy(struct session *), st_connect(struct session *),
    st_greeting(struct session *),
    st_command(struct session *), st_reply(struct session *),
    st_auth(struct session *), st_body(struct session *),
    st_chunk(struct session *), st_scan(struct session *),
    st_quarantine(struct session *), st_data(struct session *),
    st_replay(struct session *), st_final(struct session *),
    st_reset(struct session *), st_linger(struct session *);

/* RESET: only a reset of the client's connection is noticed. */
enum { CLIENT = 1, SERVER = 2, RESET = 4 };

/* How long a state may last: TimeOut since the client's last command (of a
 * body: its last byte) or the last reply that it took; TimeOut in all; what is
 * set where it is entered or goes on. */
enum clock { C_IDLE, C_TOTAL, C_OTHER };

static const struct {
	const char *name;
	int	 from;			/* whom it listens to */
	enum clock clock;
	int	(*step)(struct session *);	/* 1: got on, call again; 0: wait */
} states[] = {
	[S_PROXY] =	{ "proxy", CLIENT, C_OTHER, st_proxy },
	[S_CONNECT] =	{ "connect", CLIENT | RESET, C_OTHER, st_connect },
	[S_GREETING] =	{ "greeting", CLIENT | SERVER | RESET, C_TOTAL,
			    st_greeting },
	[S_COMMAND] =	{ "command", CLIENT | SERVER, C_IDLE, st_command },
	[S_REPLY] =	{ "reply", SERVER | RESET, C_TOTAL, st_reply },
	[S_AUTH] =	{ "auth", CLIENT | SERVER, C_IDLE, st_auth },
	[S_BODY] =	{ "body", CLIENT | SERVER, C_IDLE, st_body },
	[S_CHUNK] =	{ "chunk", CLIENT | SERVER, C_IDLE, st_chunk },
	[S_SCAN] =	{ "scan", CLIENT | SERVER, C_OTHER, st_scan },
	[S_QUARANTINE] = { "quarantine", CLIENT | SERVER, C_TOTAL, st_quarantine },
	[S_DATA] =	{ "data", CLIENT | SERVER, C_TOTAL, st_data },
	[S_REPLAY] =	{ "replay", CLIENT | SERVER, C_OTHER, st_replay },
	[S_FINAL] =	{ "final", SERVER, C_OTHER, st_final },
	[S_RESET] =	{ "reset", SERVER | RESET, C_TOTAL, st_reset },
	[S_LINGER] =	{ "linger", CLIENT, C_OTHER, st_linger },
	[S_DEAD] =	{ "dead", 0, C_OTHER, NULL },
};

static void
enter(struct session *s, enum state state)
{
	s->state = state;
	if (states[state].clock != C_OTHER)
		s->deadline = now + s->conf->timeout;
}

/*
 * Saying something.
 */

static void
log_dialogue(const struct session *s, const char *who, const char *p, size_t n)
{
	const char *nl, *end = p + n;

	if (!log_wants(LOG_DEBUG))
		return;
	for (; p < end; p = nl + 1) {
		if ((nl = memchr(p, '\n', end - p)) == NULL)
			nl = end;
		n = nl - p;
		slog(s, LOG_DEBUG, "%s %s", who,
		    printable(p, n > 0 && p[n - 1] == '\r' ? n - 1 : n));
	}
}

/* Whether a step may say a line, or pass on a reply. */
static int
client_ready(struct session *s)
{
	return buf_ready(&s->client.out, RELAYSZ + NOTESZ);
}

/* For want of memory: replies must not get out of step. */
static void
client_nomem(struct session *s)
{
	s->client.err = s->client.eof = 1;
}

/* What cannot be said ends the session. */
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

/* Promise 8: a line of our own, but what stands in it may be foreign. */
static size_t
format_line(char line[NOTESZ], const char *fmt, va_list ap)
{
	size_t i, len = vformat(line, NOTESZ - 2, fmt, ap);

	for (i = 0; i < len; i++)
		if (line[i] < ' ' || line[i] > 126)
			line[i] = '?';
	line[len++] = '\r';
	line[len++] = '\n';
	return len;
}

static void client_reply(struct session *, const char *, ...)
    __attribute__((format(printf, 2, 3)));

static void
client_reply(struct session *s, const char *fmt, ...)
{
	char line[NOTESZ];
	va_list ap;

	va_start(ap, fmt);
	client_put(s, line, format_line(line, fmt, ap));
	va_end(ap);
}

static void defer_reply(struct session *, const char *, ...)
    __attribute__((format(printf, 2, 3)));

static void
vdefer_reply(struct session *s, const char *fmt, va_list ap)
{
	char line[NOTESZ];

	if (str_set(&s->result.reply, line, format_line(line, fmt, ap)) == -1)
		client_nomem(s);
}

/* To be said when what goes before it has been done. */
static void
defer_reply(struct session *s, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vdefer_reply(s, fmt, ap);
	va_end(ap);
}

static void
send_deferred(struct session *s)
{
	client_put(s, s->result.reply.s, s->result.reply.len);
	str_free(&s->result.reply);
}

/* 0: there is no memory for it now. */
static int
server_put(struct session *s, const char *p, size_t n)
{
	if (!buf_ready(&s->server.peer.out, n))
		return 0;
	buf_put(&s->server.peer.out, p, n);
	log_dialogue(s, "SERVER >", p, n);
	return 1;
}

/*
 * Beginnings and ends.
 */

static void
envelope_reset(struct session *s)
{
	s->env.have_mail = s->env.nrcpt = 0;
	str_free(&s->env.from);
	str_free(&s->env.rcpt_list);
	str_free(&s->result.quarantined);
	str_free(&s->replay.header);
	str_free(&s->server.argument);
	s->env.rcpt_truncated = 0;
	if (s->msg.spool != -1)
		close(s->msg.spool);
	s->msg.spool = -1;
	s->msg.in_bdat = s->msg.relay_bdat = s->result.failed = 0;
	s->server.noop_at = s->result.verdict_at = 0;
	s->result.verdict = UNKNOWN;
}

/* The transaction is over, and so is XFORWARD (Postfix XFORWARD_README). */
static void
transaction_reset(struct session *s)
{
	envelope_reset(s);
	str_free(&s->xforward.addr);
	str_free(&s->xforward.helo);
}

/* QUIT where the next hop waits for a command; in the middle of a message
 * nothing, so that it never sees an end of it. */
static void
server_close(struct session *s)
{
	struct peer *p = &s->server.peer;
	int waits = s->state > S_GREETING && s->state != S_AUTH && !s->server.asked &&
	    !s->server.noop;

	if (p->fd != -1 && waits && !p->eof && !p->err &&
	    server_put(s, "QUIT\r\n", 6))
		peer_drain(&s->server.peer, 0);
	peer_close(&s->server.peer);
	s->server.asked = s->server.noop = 0;
}

static void
quarantine_drop(struct session *s)
{
	if (s->result.child != NULL)
		child_forget(s->result.child);
	s->result.child = NULL;
}

/* All but the client. */
static void
server_and_scan_close(struct session *s)
{
	server_close(s);
	clamd_cancel(s);
	quarantine_drop(s);
}

static void
session_kill(struct session *s)
{
	server_and_scan_close(s);
	enter(s, S_DEAD);
}

static void
start_linger(struct session *s)
{
	server_and_scan_close(s);
	enter(s, S_LINGER);
	s->deadline = now + s->conf->timeout;
}

/* Refuse a command.  Promise 10: a client that does not speak SMTP cannot try
 * one line after the other until some of them pass. */
static void
refuse(struct session *s, const char *reply)
{
	if (++s->refusals < MAXREFUSALS) {
		client_reply(s, "%s", reply);
		return;
	}
	slog(s, LOG_WARNING, "CLIENT: %d commands refused, session ends",
	    s->refusals);
	client_reply(s, r_too_many);
	start_linger(s);
}

const char *const outcome_names[NOUTCOMES] = {
	"clean", "virus", "clamd_error", "unscanned", "oversize", "error"
};

static enum outcome
outcome(const struct session *s)
{
	if (s->result.failed)
		return s->result.reply.len > 3 && memcmp(s->result.reply.s, "552", 3) == 0 ?
		    OUT_OVERSIZE : OUT_ERROR;
	if (s->result.verdict == CLEAN)
		return OUT_CLEAN;
	if (s->result.verdict == VIRUS)
		return OUT_VIRUS;
	if (s->conf->failopen)
		return OUT_UNSCANNED;
	return s->result.verdict == TOOBIG ? OUT_OVERSIZE : OUT_CLAMD_ERROR;
}

/* Promise 9: the line that every message gets, with its verdict. */
static void
mail_log(struct session *s, enum outcome f)
{
	static const char *const status[NOUTCOMES] = {
		"CLEAN", "VIRUS:", "CLAMAV-ERROR", "UNSCANNED", "OVERSIZE", "ERROR"
	};
	const char *p, *end, *word, *virus = f == OUT_VIRUS ? s->result.text : "";
	char line[LOGSZ];
	size_t n, room = sizeof line - sizeof "100000: , to=..., status=" -
	    strlen(status[f]) - strlen(virus);

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
	slog(s, LOG_INFO, "%.*s, status=%s%s", (int)n, line, status[f], virus);
}

static void
mail_log_json(struct session *s, enum outcome f, const char *reply, size_t n)
{
	const char *client = addr_text(&s->client_addr);

	json_begin(s, LOG_INFO);
	json_text("event", "mail", 4);
	json_text("status", outcome_names[f], strlen(outcome_names[f]));
	if (s->result.verdict == VIRUS)
		json_text("virus", s->result.text, strlen(s->result.text));
	if (s->result.verdict == FAILED)
		json_text("reason", s->result.text, strlen(s->result.text));
	json_text("client", client, strlen(client));
	if (s->helo.len > 7)		/* behind the verb, without the CRLF */
		json_text("helo", s->helo.s + 5, s->helo.len - 7);
	json_text("from", s->env.from.s, s->env.from.len);
	json_lines("to", s->env.rcpt_list.s);
	json_number("size", s->msg.size);
	json_number("ms", now - s->msg.dot_at);
	if (s->result.verdict_at != 0)
		json_number("scan_ms", s->result.verdict_at - s->msg.dot_at);
	if (n > 0)
		json_text("reply", reply, strcspn(reply, "\r\n"));
	if (s->result.quarantined.len > 0)
		json_text("quarantine", s->result.quarantined.s, s->result.quarantined.len);
	json_end(LOG_INFO);
}

/* What becomes of it is certain, and what the client will hear (n bytes). */
static void
mail_done(struct session *s, const char *reply, size_t n)
{
	enum outcome f = outcome(s);

	count.messages[f]++;
	count.bytes += s->msg.size;
	if (!log_is_json())
		mail_log(s, f);
	else if (log_wants(LOG_INFO))
		mail_log_json(s, f, reply, n);
}

/*
 * A message that came whole, but is not forwarded: `held' has the reply.
 */
static void
reject_message(struct session *s)
{
	mail_done(s, s->result.reply.s, s->result.reply.len);
	s->result.failed = 1;		/* nothing that comes now changes `held' */
	enter(s, S_RESET);
}

static void fail_message(struct session *, const char *, ...)
    __attribute__((format(printf, 2, 3)));

/*
 * From 354 to the final dot nothing is answered: the first error is kept, the
 * rest of the body is read for nothing, and the error is told at the dot.
 */
static void
fail_message(struct session *s, const char *fmt, ...)
{
	va_list ap;

	if (s->result.failed)
		return;
	s->result.failed = 1;
	va_start(ap, fmt);
	vdefer_reply(s, fmt, ap);
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

	fail_message(s, full ? r_full : r_local, what, strerror(errno));
}

/*
 * The next hop is gone, or has said what no mail server says here.  Whatever
 * it was that the client waits for, it hears of it.
 */
static int
server_lost(struct session *s, const char *why)
{
	slog(s, LOG_WARNING, "SERVER: %s%s", why, s->state == S_FINAL ?
	    ": whether it has the message is unknown" : "");
	peer_close(&s->server.peer);
	s->server.asked = s->server.noop = 0;
	switch (s->state) {
	case S_BODY:
	case S_CHUNK:
	case S_SCAN:
	case S_QUARANTINE:
		fail_message(s, r_hop_lost_mail, why);
		return 1;
	case S_DATA:
	case S_REPLAY:
	case S_FINAL:
		defer_reply(s, r_hop_lost_mail, why);
		s->result.failed = 1;
		mail_done(s, s->result.reply.s, s->result.reply.len);
		/* FALLTHROUGH */
	case S_RESET:
		send_deferred(s);
		break;
	default:
		client_reply(s, r_hop_lost, why);
		break;
	}
	start_linger(s);
	return 1;
}

static int
client_fill(struct session *s)
{
	int got = peer_fill(&s->client);

	if (s->client.eof)
		s->eof_at = now;
	return got;
}

/*
 * Whether the client has gone before its message was forwarded, and will send
 * it again: it was reset; or it closed the connection some time after the final
 * dot, for it was tired of waiting.  EOF soon after the dot is a half-close: many
 * devices send no QUIT and wait for nothing.  So is EOF after a whole command.
 */
static int
client_gone(struct session *s)
{
	const struct buf *in = &s->client.in;

	if (!s->client.eof)
		return s->client.err;
	return peer_reset(&s->client) ||
	    (s->eof_at - s->msg.dot_at > HALF_CLOSE_TIME &&
	    memchr(buf_head(in), '\n', buf_len(in)) == NULL);
}

/* Why a body does not end, for the log: LF.LF ends none. */
static const char *
bare_lf(const struct session *s)
{
	return s->state == S_BODY && s->msg.body_state == LINE && s->msg.held_bytes == 0 ?
	    ": client ends lines with LF alone" : "";
}

/* Nobody is there to hear of it: the next hop must not get this message. */
static int
abort_transaction(struct session *s)
{
	slog(s, LOG_NOTICE, "CLIENT: gone before its message was forwarded%s",
	    bare_lf(s));
	session_kill(s);
	return 1;
}

/*
 * Replies of the next hop.
 */

struct reply {
	int	 code, class;		/* 250 and 2 */
	const char *text;		/* in server.in: all lines, with line ends */
	size_t	 len;
};

/* For the log. */
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

/* Three digits and a separator; 0: no reply line. */
static int
reply_code(const char *p, size_t n)
{
	if (n < 4 || p[0] < '2' || p[0] > '5' || !isdigit((unsigned char)p[1]) ||
	    !isdigit((unsigned char)p[2]) || strchr(" -\r\n", p[3]) == NULL ||
	    p[3] == '\0')
		return 0;
	return (p[0] - '0') * 100 + (p[1] - '0') * 10 + p[2] - '0';
}

/*
 * The whole reply that the next hop owes us, all its lines.  REPLY: it is there
 * (reply_eat() takes it away).  Else what a step returns: 0, wait; 1, none will
 * come, the hop is lost.
 */
#define REPLY_COMPLETE	2

static int
reply_get(struct session *s, struct reply *r)
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
		if (code == 0 || code != r->code)
			return server_lost(s, "it does not speak SMTP");
		s->server.reply_seen = nl + 1 - r->text;
		if (line[3] != '-' && s->server.reply_seen <= REPLYSZ) {
			r->len = s->server.reply_seen;
			log_dialogue(s, "SERVER <", r->text, r->len);
			return REPLY_COMPLETE;
		}
	}
	if (buf_len(in) > REPLYSZ)		/* promise 6 */
		return server_lost(s, "its reply is too long");
	return s->server.peer.eof ? server_lost(s, "it closed the connection") : 0;
}

static void
reply_eat(struct session *s, const struct reply *r)
{
	if (s->server.peer.fd == -1)
		return;			/* lost meanwhile, and the buffer with it */
	s->server.reply_seen = 0;
	buf_eat(&s->server.peer.in, r->len);
}

/* Promise 8: a reply as the client may see it, until the next one is cleaned:
 * CRLF behind each line, and a space in place of each byte that is no text.  Its
 * length; a NUL follows. */
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

static void
defer_relay(struct session *s, const struct reply *r)
{
	if (str_set(&s->result.reply, clean, reply_clean(r)) == -1)
		client_nomem(s);
}

static void
relay(struct session *s, const struct reply *r)
{
	client_put(s, clean, reply_clean(r));
}

/* It ends the session. */
static int
relay_and_close(struct session *s, const struct reply *r)
{
	relay(s, r);
	peer_close(&s->server.peer);
	start_linger(s);
	return 1;
}

/*
 * While the client or clamd takes its time: NOOPs, if KeepAlives are on, and
 * whatever the next hop says unasked, which can only be the end.  1: it waits
 * for a command; 0: it owes us a reply, or it is lost (server.fd is -1).
 */
static int
server_idle(struct session *s)
{
	struct reply r;

	while (s->server.peer.fd != -1 &&
	    (buf_len(&s->server.peer.in) > 0 || s->server.peer.eof)) {
		if (reply_get(s, &r) != REPLY_COMPLETE)
			return 0;
		if (s->server.noop && r.class == 2) {
			s->server.noop = 0;
			s->server.noop_at = now + s->conf->keepalives;
			reply_eat(s, &r);
			continue;
		}
		slog(s, LOG_NOTICE, "SERVER: said out of turn: %s",
		    first_line(&r));
		if (r.class == 4 && !s->result.failed) {
			s->result.failed = 1;
			defer_relay(s, &r);
		}
		fail_message(s, r_hop_lost_mail, "it refused a NOOP");
		peer_close(&s->server.peer);
		s->server.noop = 0;
	}
	if (s->server.peer.fd == -1)
		return 0;
	if (s->server.noop_at != 0 && now >= s->server.noop_at && !s->server.noop && !s->result.failed) {
		s->server.noop = server_put(s, "NOOP\r\n", 6);
		s->server.noop_at = now + s->conf->keepalives;
	}
	return !s->server.noop;
}

/*
 * CONNECT.
 */

/* The original target of a redirected connection: by REDIRECT from conntrack,
 * by TPROXY it is the address that was connected to. */
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

/* Both ends must agree: on one machine the kernel gives one port to several
 * connections with different far ends. */
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

struct session *
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
	s->server.peer.fd = s->scan.peer.fd = s->msg.spool = -1;
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
	s->state = S_PROXY;
	s->deadline = now + PROXY_TIME;
	return s;
}

/*
 * PROXY.
 */

/* Decimal digits up to a blank or the end; -1: they are none.  INT64_MAX: more
 * than can be meant. */
static int64_t
parse_octets(const char *p)
{
	int64_t n = 0;
	int digits = 0;

	for (; isdigit((unsigned char)*p); p++) {
		if (++digits > 18)
			return INT64_MAX;
		n = n * 10 + (*p - '0');
	}
	return digits > 0 && strchr(" \t", *p) != NULL ? n : -1;
}

/* Version 2, behind its signature. */
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
	number = parse_octets(port + 1);
	if (number < 0 || number > 65535 || addr_ip(a, from, number) == -1 ||
	    (line[9] == '6') != (strchr(from, ':') != NULL))
		return -1;
	return nl + 1 - p;
}

int
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

static void
session_connect(struct session *s)
{
	slog(s, LOG_INFO, "accepted connection from: %s",
	    addr_text(&s->client_addr));
	enter(s, S_CONNECT);
	s->deadline = now + s->conf->timeout;
	if (!is_loop(s->client.fd, &s->peer_addr, &s->local_addr))
		return;
	slog(s, LOG_ERR, "mail loop: %s is our own connection to a next hop; "
	    "check OutAddress or the firewall's redirection",
	    addr_full(&s->peer_addr));
	client_reply(s, r_loop);
	start_linger(s);
}

static int
st_proxy(struct session *s)
{
	struct buf *in = &s->client.in;
	struct addr a;
	int n;

	if (!is_proxy(s->conf, &s->peer_addr)) {
		session_connect(s);
		return 1;
	}
	n = proxy_parse(buf_head(in), buf_len(in), &a);
	if (n == 0 && !s->client.eof)
		return 0;
	if (n <= 0) {
		slog(s, LOG_WARNING, "%s: no PROXY header, though ProxyFrom has "
		    "this address", addr_text(&s->peer_addr));
		session_kill(s);
		return 1;
	}
	buf_eat(in, n);
	if (a.len > 0)
		s->client_addr = a;
	session_connect(s);
	return 1;
}

/* Which address is next; 0: it is being looked up, -1: there is none. */
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
	target_resolve(t, 0);
	if (t->naddr == 0)
		return t->resolving ? 0 : -1;
	if ((s->server.addr_index = target_next(t, s->server.addrs_tried)) == -1)
		return -1;
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
	client_reply(s, r_no_hop, why);
	start_linger(s);
	return 1;
}

/* How many addresses there are to try. */
static int
server_naddrs(const struct session *s)
{
	const struct target *t = s->conf->out;

	return s->conf->transparent || t->naddr == 0 ? 1 : t->naddr;
}

/* The client has gone before anything was sent to it.  One that has sent
 * commands and closed its side only is served. */
static int
gone_early(struct session *s)
{
	const struct buf *in = &s->client.in;

	if (!s->client.err && (!s->client.eof ||
	    memchr(buf_head(in), '\n', buf_len(in)) != NULL))
		return 0;
	slog(s, LOG_DEBUG, "CLIENT: gone before the greeting");
	session_kill(s);
	return 1;
}

static int
st_connect(struct session *s)
{
	socklen_t len = sizeof(int);
	int err = 0, done;

	if (gone_early(s))
		return 1;
	if (s->server.peer.fd == -1) {
		switch (server_next_addr(s)) {
		case 0:
			return now < s->deadline ? 0 :
			    connect_failed(s, "its name is still being looked up");
		case -1:
			return connect_failed(s, "no address");
		}
		s->server.peer.fd = addr_connect(&s->server.addr, &done);
		s->server.peer.connecting = s->server.peer.fd != -1 && !done;
		if (s->server.peer.fd == -1)
			err = errno;
		s->deadline = now + s->conf->timeout / server_naddrs(s);
		s->server.local.len = sizeof s->server.local.u;
		if (getsockname(s->server.peer.fd, &s->server.local.u.sa,
		    &s->server.local.len) == -1)
			s->server.local.len = 0;
	} else if (!s->server.peer.connecting)
		getsockopt(s->server.peer.fd, SOL_SOCKET, SO_ERROR, &err, &len);
	else if (now >= s->deadline)
		err = ETIMEDOUT;
	if (err == 0) {
		if (s->server.peer.connecting)
			return 0;
		enter(s, S_GREETING);
		return 1;
	}
	peer_close(&s->server.peer);
	s->server.addrs_tried |= 1U << s->server.addr_index;
	if (s->conf->transparent ||
	    target_next(s->conf->out, s->server.addrs_tried) == -1)
		return connect_failed(s, strerror(err));
	return 1;
}

/*
 * GREETING.
 */

static int
st_greeting(struct session *s)
{
	struct reply r;
	int got;

	if (gone_early(s))
		return 1;
	if (!client_ready(s))
		return 0;
	if ((got = reply_get(s, &r)) != REPLY_COMPLETE)
		return got;
	if (r.class == 3)
		return server_lost(s, "its greeting makes no sense");
	if (r.class == 4)
		return relay_and_close(s, &r);
	if (r.class == 5) {		/* RFC 5321 3.1 */
		slog(s, LOG_NOTICE, "SERVER: refused the session: %s",
		    first_line(&r));
		relay(s, &r);
		s->rejected = 1;
		enter(s, S_COMMAND);
		server_close(s);
		return 1;
	}
	if (!s->conf->transparent)
		target_worked(s->conf->out, &s->server.addr);
	client_reply(s, "%d " OUR_NAME, r.code);
	reply_eat(s, &r);
	enter(s, S_COMMAND);
	return 1;
}

/*
 * COMMAND: the verbs.
 */

/*
 * take looks at a line (n bytes, NUL-terminated, without line end) and says
 * whether it is passed on; 0: it has been answered.  told is given the reply;
 * 0: relay it, 1: done.
 */
struct verb {
	const char *name;
	int	(*on_command)(struct session *, char *line, size_t n);
	int	(*on_reply)(struct session *, const struct reply *);
	int	 in_chunks;		/* may stand between two BDATs */
	int	 unnamed;		/* may come before XCLIENT */
};

static const struct verb verb_xclient;

/* The address in "MAIL FROM:<...> ..." or RCPT, bare; behind it: parameters. */
static const char *
path_parse(const char *line, const char **addr, size_t *n)
{
	const char *p = strchr(line, ':');
	int quoted = 0;

	*addr = "";
	*n = 0;
	if (p == NULL)
		return line + strlen(line);
	p += 1 + strspn(p + 1, " \t");
	if (*p != '<') {
		*addr = p;
		*n = strcspn(p, " \t");
		return p + *n;
	}
	*addr = ++p;
	for (; *p != '\0' && (quoted || *p != '>'); p++)
		if (*p == '\\' && p[1] != '\0')
			p++;
		else if (*p == '"')
			quoted = !quoted;
	if (*p == '\0')			/* the quotes do not pair */
		p = *addr + strcspn(*addr, ">");
	*n = p - *addr;
	return *p == '>' ? p + 1 : p;
}

static int
no_memory(struct session *s)
{
	client_reply(s, r_full, "memory", strerror(ENOMEM));
	return 0;
}

static int
keep_address(struct session *s, const char *line, const char **params)
{
	const char *addr;
	size_t n;

	*params = path_parse(line, &addr, &n);
	return str_set(&s->server.argument, addr, n) == 0 || no_memory(s);
}

/* The largest message that is scanned, in bytes; 0: no limit.  clamd's own limits
 * count the scan line too. */
static int64_t
scan_limit(const struct session *s)
{
	int64_t max = s->conf->maxscansize, line = scan_line_len;

	if (max > line)
		return max - line;
	return max > 0;
}

/* The most that a message may have, in bytes; 0: no limit.  With ScanFailure:
 * pass a large one is forwarded unscanned, so MaxScanSize is none. */
static int64_t
size_limit(const struct session *s)
{
	int64_t max = s->conf->failopen ? 0 : scan_limit(s);

	if (max == 0 || (s->server.size > 0 && s->server.size < max))
		max = s->server.size;
	return max;
}

static int
mail_command(struct session *s, char *line, size_t n)
{
	int64_t limit = size_limit(s);
	const char *p;

	(void)n;
	if (!keep_address(s, line, &p))
		return 0;
	for (p += strspn(p, " \t"); *p != '\0';
	    p += strcspn(p, " \t"), p += strspn(p, " \t")) {
		if (strncasecmp(p, "SIZE=", 5) == 0 && limit > 0 &&
		    parse_octets(p + 5) > limit) {
			client_reply(s, r_too_big, (long long)limit);
			return 0;
		}
		if (strncasecmp(p, "BODY=BINARYMIME", 15) == 0) {
			refuse(s, r_binary);
			return 0;
		}
	}
	return 1;
}

static int
mail_reply(struct session *s, const struct reply *r)
{
	struct str from = s->server.argument;

	if (r->class != 2)
		return 0;
	memset(&s->server.argument, 0, sizeof s->server.argument);
	envelope_reset(s);
	s->env.have_mail = 1;
	s->env.from = from;
	if (s->env.from.len == 0 && str_set(&s->env.from, "<>", 2) == -1)
		client_nomem(s);
	return 0;
}

static int
rcpt_command(struct session *s, char *line, size_t n)
{
	const char *params;

	(void)n;
	return keep_address(s, line, &params);
}

/* All count, though no more than RCPTSZ bytes of them are remembered. */
static int
rcpt_reply(struct session *s, const struct reply *r)
{
	if (r->class != 2)
		return 0;
	s->env.nrcpt++;
	if (s->env.rcpt_truncated)
		return 0;
	if (s->env.rcpt_list.len + s->server.argument.len + 1 > RCPTSZ) {
		slog(s, LOG_NOTICE, "so many recipients that RECIPIENTS and "
		    "the log have only the first of them");
		s->env.rcpt_truncated = 1;
		str_set(&s->server.argument, "...", 3);
	}
	if (str_add(&s->env.rcpt_list, s->server.argument.s, s->server.argument.len) == -1 ||
	    str_add(&s->env.rcpt_list, "\n", 1) == -1)
		client_nomem(s);
	return 0;
}

static int
rset_reply(struct session *s, const struct reply *r)
{
	if (r->class == 2)
		transaction_reset(s);
	return 0;
}

static int
helo_command(struct session *s, char *line, size_t n)
{
	return (str_set(&s->helo, line, n) == 0 &&
	    str_add(&s->helo, "\r\n", 2) == 0) || no_memory(s);
}

static int
starttls_command(struct session *s, char *line, size_t n)
{
	(void)line;
	(void)n;
	refuse(s, r_no_tls);
	return 0;
}

static int
xclient_command(struct session *s, char *line, size_t n)
{
	(void)line;
	(void)n;
	slog(s, LOG_WARNING, "client attempted use of privileged XCLIENT feature");
	refuse(s, r_xclient);
	return 0;
}

static int
xforward_command(struct session *s, char *line, size_t n)
{
	if (s->env.have_mail) {
		refuse(s, r_sequence);
		return 0;
	}
	return str_set(&s->server.argument, line, n) == 0 || no_memory(s);
}

/* xtext (RFC 3461 4) to what it stands for. */
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
	if (n == 0 || *p == '[')		/* [UNAVAILABLE], [TEMPUNAVAIL] */
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
 * EHLO: of what the next hop offers, only what is known to leave the message
 * where we can see it.  An unknown extension is an unknown way around clamd.
 */
static const char *const ehlo_keywords[] = {
	"SIZE", "8BITMIME", "DSN", "SMTPUTF8", "ENHANCEDSTATUSCODES", "AUTH",
	"ETRN", "VRFY", "EXPN", "HELP", "XFORWARD", "DELIVERBY",
};

static int
word_equal(const char *p, size_t n, const char *word)
{
	return n == strlen(word) && strncasecmp(p, word, n) == 0;
}

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

/* One line of the list, NUL-terminated, behind its code; 1: the client sees
 * it as it is. */
static int
ehlo_line(struct session *s, const char *p)
{
	size_t i, n = strcspn(p, " =");

	if (word_equal(p, n, "CHUNKING"))
		s->server.chunking = 1;
	if (word_equal(p, n, "XCLIENT"))
		learn_xclient(s, p + n);
	if (word_equal(p, n, "SIZE") && p[n] == ' ' && parse_octets(p + n + 1) > 0)
		s->server.size = parse_octets(p + n + 1);
	if (p[n] == '=')		/* an old form that some clients look for */
		return word_equal(p, n, "AUTH");
	for (i = 0; i < sizeof ehlo_keywords / sizeof ehlo_keywords[0]; i++)
		if (word_equal(p, n, ehlo_keywords[i]))
			return 1;
	return 0;
}

static int
ehlo_add(struct session *s, const char *text)
{
	if (str_add(&s->result.reply, "250-", 4) == 0 &&
	    str_add(&s->result.reply, text, strlen(text)) == 0 &&
	    str_add(&s->result.reply, "\r\n", 2) == 0)
		return 0;
	client_nomem(s);
	return -1;
}

/* What the client shall see of an EHLO reply goes to `held'. */
static void
ehlo_filter(struct session *s, const struct reply *r, int esmtp)
{
	char *p, *next, size[48];

	s->server.size = s->server.chunking = s->server.xclient = 0;
	s->result.reply.len = 0;
	if (ehlo_add(s, OUR_NAME) == -1)
		return;
	reply_clean(r);
	for (p = strchr(clean, '\n') + 1; *p != '\0' && esmtp; p = next + 1) {
		next = strchr(p, '\n');
		next[-1] = '\0';
		if (!ehlo_line(s, p + 4))
			continue;
		if (strncasecmp(p + 4, "SIZE", 4) == 0 && size_limit(s) > 0) {
			format(size, sizeof size, "SIZE %lld",
			    (long long)size_limit(s));
			ehlo_add(s, size);
		} else
			ehlo_add(s, p + 4);
	}
	if (esmtp) {
		ehlo_add(s, "PIPELINING");
		if (s->server.chunking)
			ehlo_add(s, "CHUNKING");
	}
	if (s->client.err)
		return;
	for (p = s->result.reply.s + s->result.reply.len - 2; p > s->result.reply.s && p[-1] != '\n'; p--)
		;
	p[3] = ' ';		/* the last line says that it is the last */
}

/* The next hop is to see the client's address, not ours. */
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
	n += format(line + n, sizeof line - n, "\r\n");
	if (!server_put(s, line, n))
		return server_lost(s, "no memory for a command to it");
	s->server.verb = &verb_xclient;
	s->server.asked = 1;
	enter(s, S_REPLY);
	return 1;
}

/*
 * Promise 10: XCLIENT goes out at the first accepted HELO or EHLO.  Later it
 * would undo an AUTH.  After HELO the next hop lists nothing: NAME and ADDR are
 * tried, and if they are refused, EHLO may still list them.
 */
static int
hello_reply(struct session *s, const struct reply *r, int esmtp)
{
	if (r->class != 2)
		return 0;
	transaction_reset(s);
	ehlo_filter(s, r, esmtp);
	if (!esmtp)
		s->server.xclient = X_NAME | X_ADDR;
	if (s->xclient_state == XC_WANTED || (s->xclient_state == XC_EHLO && esmtp)) {
		if (s->server.xclient != 0)
			return xclient_send(s);
		slog(s, LOG_WARNING, "SERVER: offers no XCLIENT: "
		    "it takes the client for this host");
		s->xclient_state = XC_DONE;
	}
	if (!s->client.err)
		send_deferred(s);
	enter(s, S_COMMAND);
	return 1;
}

static int
ehlo_reply(struct session *s, const struct reply *r)
{
	return hello_reply(s, r, 1);
}

static int
helo_reply(struct session *s, const struct reply *r)
{
	return hello_reply(s, r, 0);
}

static int data_command(struct session *, char *, size_t);
static int bdat_command(struct session *, char *, size_t);

static const struct verb verbs[] = {
	{ "EHLO", helo_command, ehlo_reply, 1, 1 },
	{ "HELO", helo_command, helo_reply, 1, 1 },
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
	{ "XCLIENT", xclient_command, NULL, 1, 0 },
	{ "STARTTLS", starttls_command, NULL, 1, 0 },
};

static const struct verb *
verb_find(const char *line)
{
	size_t i, n = strcspn(line, " \t");

	for (i = 0; i < sizeof verbs / sizeof verbs[0]; i++)
		if (word_equal(line, n, verbs[i].name))
			return &verbs[i];
	return NULL;
}

static int
verb_is(const struct verb *v, const char *name)
{
	return v != NULL && strcmp(v->name, name) == 0;
}

/* The codes that refuse the command.  Any other is the next hop's reply to the
 * client, as the greeting would have been. */
static int
is_xclient_refused(const struct reply *r)
{
	return (r->code >= 500 && r->code <= 504) || r->code == 550;
}

/* After XCLIENT the next hop is where it was before the first HELO: once more,
 * for its list is another one now. */
static int
xclient_reply(struct session *s, const struct reply *r)
{
	int helo = *s->helo.s == 'H' || *s->helo.s == 'h';

	if (r->code == 501 && helo && (s->server.xclient & X_NAME)) {
		s->server.xclient &= ~X_NAME;
		return xclient_send(s);
	}
	if (is_xclient_refused(r)) {
		slog(s, LOG_WARNING, "SERVER: refused XCLIENT: %s",
		    first_line(r));
		s->xclient_state = helo ? XC_EHLO : XC_DONE;
		send_deferred(s);
		enter(s, S_COMMAND);
		return 1;
	}
	if (r->class != 2) {
		slog(s, LOG_NOTICE, "SERVER: refused the client: %s",
		    first_line(r));
		if (r->code == 421)
			return 0;
		relay(s, r);
		start_linger(s);
		return 1;
	}
	s->xclient_state = XC_DONE;
	s->server.verb = verb_find(s->helo.s);
	if (!server_put(s, s->helo.s, s->helo.len))
		return server_lost(s, "no memory for a command to it");
	s->server.asked = 1;
	enter(s, S_REPLY);
	return 1;
}

static const struct verb verb_xclient = { "XCLIENT", NULL, xclient_reply, 0, 0 };

/*
 * Promise 10: a line in the client's buffer, whole or not, that no SMTP client
 * sends.  It begins with a verb of HTTP, or with a byte that is neither a letter
 * nor a blank, as a TLS ClientHello does.  (Postfix: smtpd_forbidden_commands.)
 * An empty line is refused, and no more.
 */
static int
is_not_smtp(const struct session *s)
{
	static const char *const words[] = { "CONNECT", "GET", "POST" };
	const char *p = buf_head(&s->client.in);
	size_t len = buf_len(&s->client.in), i, n;

	if (s->skipping || len == 0 || *p == ' ' || *p == '\t' || *p == '\n' ||
	    (*p == '\r' && (len == 1 || p[1] == '\n')))
		return 0;
	if ((*p < 'A' || *p > 'Z') && (*p < 'a' || *p > 'z'))
		return 1;
	for (n = 0; n < len && memchr(" \t\r\n", p[n], 4) == NULL; n++)
		;
	for (i = 0; i < sizeof words / sizeof words[0]; i++)
		if (n < len && word_equal(p, n, words[i]))
			return 1;
	return 0;
}

static int
not_smtp(struct session *s)
{
	const char *p = buf_head(&s->client.in);
	size_t n = buf_len(&s->client.in);
	const char *nl = memchr(p, '\n', n);

	if (nl != NULL)
		n = nl - p;
	slog(s, LOG_WARNING, "CLIENT: does not speak SMTP, session ends: %s",
	    printable(p, n < 60 ? n : 60));
	client_reply(s, r_not_smtp);
	start_linger(s);
	return 1;
}

/*
 * Take a line from the client: 1, with *line NUL-terminated and without its
 * end; 0: wait; -1: it was refused.  *line stands in client.in, good until
 * that is read into again.
 */
static int
client_line(struct session *s, char **line, size_t *n)
{
	struct buf *in = &s->client.in;
	size_t len = buf_len(in);
	char *p = buf_head(in), *nl = memchr(p, '\n', len);

	if (nl == NULL) {
		if (len > LINESZ + 1 || s->skipping) {	/* promise 6 */
			s->skipping = 1;
			buf_eat(in, len);
		}
		return 0;
	}
	*line = p;
	*n = nl > p && nl[-1] == '\r' ? nl - p - 1 : nl - p;
	if (s->skipping || *n > LINESZ) {
		s->skipping = 0;
		buf_eat(in, nl + 1 - p);
		refuse(s, r_long);
		return -1;
	}
	p[*n] = '\0';
	if (memchr(p, '\0', *n) != NULL || memchr(p, '\r', *n) != NULL) {
		buf_eat(in, nl + 1 - p);
		refuse(s, r_control);
		return -1;
	}
	in->r += nl + 1 - p;	/* not buf_eat(): the line must stay */
	return 1;
}

/* AUTH's initial response is a password. */
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

static int
command(struct session *s, char *line, size_t n)
{
	const struct verb *v = verb_find(line);

	log_command(s, "CLIENT <", v, line, n);
	if (v == NULL) {
		refuse(s, r_unknown);
		return 1;
	}
	/* Promise 10: DATA is the last command of a group (RFC 2920 3.1).  What
	 * comes with it would be taken for commands if DATA is refused. */
	if (verb_is(v, "DATA") && peer_waiting(&s->client)) {
		slog(s, LOG_WARNING, "CLIENT: sent input after DATA without "
		    "waiting for the reply, session ends");
		client_reply(s, r_early_body);
		start_linger(s);
		return 1;
	}
	if (s->rejected && verb_is(v, "QUIT")) {
		client_reply(s, r_bye);
		start_linger(s);
		return 1;
	}
	if ((s->msg.in_bdat && !v->in_chunks) ||
	    (s->xclient_state == XC_WANTED && !v->unnamed) ||
	    (s->rejected && !verb_is(v, "BDAT"))) {
		refuse(s, r_sequence);
		return 1;
	}
	if (v->on_command != NULL && !v->on_command(s, line, n))
		return 1;
	buf_put(&s->server.peer.out, line, n);
	buf_put(&s->server.peer.out, "\r\n", 2);
	log_command(s, "SERVER >", v, line, n);
	s->server.verb = v;
	s->server.asked = 1;
	enter(s, S_REPLY);
	return 1;
}

/* The next hop speaks unasked: that is its farewell. */
static int
server_spoke(struct session *s)
{
	struct reply r;
	int got;

	if ((got = reply_get(s, &r)) != REPLY_COMPLETE)
		return got;
	slog(s, LOG_NOTICE, "SERVER: said unasked: %s",
	    first_line(&r));
	if (r.code < 400)	/* not to be taken for an answer to anything */
		return server_lost(s, "it spoke unasked");
	return relay_and_close(s, &r);
}

static void
log_closed(const struct session *s)
{
	if (s->env.have_mail)
		slog(s, LOG_NOTICE, "CLIENT: closed the connection "
		    "in the middle of a transaction");
}

static int
st_command(struct session *s)
{
	char *line;
	size_t n;
	int r;

	if (!client_ready(s) || !buf_ready(&s->server.peer.out, LINESZ + 2))
		return 0;
	if (buf_len(&s->server.peer.in) > 0 || s->server.peer.eof)
		return server_spoke(s);
	if (is_not_smtp(s))
		return not_smtp(s);
	r = client_line(s, &line, &n);
	if (r == 1) {
		r = command(s, line, n);
		buf_eat(&s->client.in, 0);
		return r;
	}
	if (r == 0 && (s->client.eof || s->client.err)) {
		log_closed(s);
		start_linger(s);	/* it may have closed its side only */
		return 1;
	}
	return r != 0;
}

/*
 * REPLY.
 */

static int
st_reply(struct session *s)
{
	struct reply r;
	int auth = verb_is(s->server.verb, "AUTH"), quit = verb_is(s->server.verb, "QUIT"), got, done;

	if (s->client.err) {
		log_closed(s);
		session_kill(s);
		return 1;
	}
	if (!client_ready(s))
		return 0;
	if ((got = reply_get(s, &r)) != REPLY_COMPLETE)
		return got;
	s->server.asked = 0;
	if (r.class == 3 && !(auth && r.code == 334))
		return server_lost(s, "its reply makes no sense");
	done = s->server.verb->on_reply != NULL && s->server.verb->on_reply(s, &r);
	if (!done)
		relay(s, &r);
	reply_eat(s, &r);
	if (done)
		return 1;
	if (quit || r.code == 421) {
		peer_close(&s->server.peer);
		start_linger(s);
	} else
		enter(s, r.code == 334 ? S_AUTH : S_COMMAND);
	return 1;
}

/*
 * AUTH: whatever the line looks like, it is an answer to a 334.
 */

static int
st_auth(struct session *s)
{
	char *line;
	size_t n;
	int r;

	if (!client_ready(s) || !buf_ready(&s->server.peer.out, LINESZ + 2))
		return 0;
	if (buf_len(&s->server.peer.in) > 0 || s->server.peer.eof)
		return server_spoke(s);
	switch (r = client_line(s, &line, &n)) {
	case 1:
		slog(s, LOG_DEBUG, "CLIENT < ***");
		slog(s, LOG_DEBUG, "SERVER > ***");
		buf_put(&s->server.peer.out, line, n);
		buf_put(&s->server.peer.out, "\r\n", 2);
		buf_eat(&s->client.in, 0);
		s->server.asked = 1;
		enter(s, S_REPLY);
		return 1;
	case -1:		/* the next hop still waits for it */
		start_linger(s);
		return 1;
	}
	if (!s->client.eof && !s->client.err)
		return 0;
	start_linger(s);
	return 1;
}

/*
 * The spool.  What goes into it is gathered, pieces of the read buffer where
 * they stand, and written by one call; the scan line before the first of them.
 */

static struct iovec gather[256];	/* the first is the scan line's */
static int ngather = 1;

static void
spool_flush(struct session *s)
{
	struct iovec *v = gather;
	off_t left = scan_line_len + s->msg.size - s->msg.spool_size;
	ssize_t n;

	v->iov_base = (char *)(uintptr_t)scan_line;
	v->iov_len = s->msg.spool_size == 0 ? scan_line_len : 0;
	while (left > 0 && !s->result.failed) {
		n = pwritev(s->msg.spool, v, gather + ngather - v, s->msg.spool_size);
		if (n == -1 && errno == EINTR)
			continue;
		if (n == -1) {
			fail_message_errno(s, "TempDirectory");
			break;
		}
		s->msg.spool_size += n;
		left -= n;
		for (; left > 0 && (size_t)n >= v->iov_len; v++)
			n -= v->iov_len;
		if (left > 0) {
			v->iov_base = (char *)v->iov_base + n;
			v->iov_len -= n;
		}
	}
	ngather = 1;
}

static int
is_name_char(char c)
{
	return c > ' ' && c < 127 && c != ':';
}

/*
 * Find the end of the header section: the first line that is neither a header
 * nor goes on with one.  Lines from an mbox file (From_, quoted or not) may stand
 * before it; a server like Postfix takes them for headers there, and nowhere else.
 */
static void
header_scan(struct session *s, const char *p, size_t n)
{
	off_t at = s->msg.size;

	for (; n > 0 && s->msg.header_state != H_DONE; p++, n--, at++)
		switch (s->msg.header_state) {
		case H_FIRST:
			s->msg.top = s->msg.header_end = at;
			s->msg.matched = *p == 'F';
			s->msg.indented = *p == ' ' || *p == '\t';
			s->msg.header_state = *p == 'F' || *p == '>' ? H_FROM :
			    is_name_char(*p) ? H_NAME : H_DONE;
			break;
		case H_MBOX:
			if (*p == '\n')
				s->msg.header_state = H_FIRST;
			break;
		case H_LINE:
			if (*p == ' ' || *p == '\t') {
				s->msg.header_state = H_REST;
				break;
			}
			s->msg.header_end = at;
			s->msg.header_state = is_name_char(*p) ? H_NAME : H_DONE;
			break;
		case H_FROM:
			if (*p == '>' && s->msg.matched == 0)
				break;
			if (*p == "From "[s->msg.matched]) {
				if (++s->msg.matched == 5)
					s->msg.header_state = H_MBOX;
				break;
			}
			s->msg.header_state = H_NAME;
			/* FALLTHROUGH */
		case H_NAME:
			if (is_name_char(*p))
				break;
			/* FALLTHROUGH */
		case H_BLANK:
			s->msg.header_state = *p == ':' ? H_REST :
			    *p == ' ' || *p == '\t' ? H_BLANK : H_DONE;
			break;
		case H_REST:
			if (*p == '\n')
				s->msg.header_state = H_LINE;
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

	if (s->result.failed || n == 0)
		return;
	if (limit > 0 && s->msg.size + (int64_t)n > limit) {
		fail_message(s, r_too_big, (long long)limit);
		return;
	}
	if (s->msg.header_state != H_DONE)
		header_scan(s, p, n);
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
#define MAXPENDING	(1 << 24)	/* they are written in one go */
static const char crlf[] = "\r\n", nuls[BLOCKSZ], spaces[] =
    "                                ";

/* The CRs or NULs that were held back turn out to be text. */
static void
spool_append_held(struct session *s, const char *block)
{
	size_t n;

	for (; s->msg.held_bytes > 0; s->msg.held_bytes -= n) {
		n = s->msg.held_bytes < BLOCKSZ ? s->msg.held_bytes : BLOCKSZ;
		spool_append(s, block, n);
	}
}

/* The first CR or LF of p .. stop, or stop.  Eight bytes at a time, for most of
 * what we do with a mail is this: those below 14 get their top bit set, and
 * some behind them, which costs another look. */
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

/* How far p .. stop needs no change: up to the first line end that is no CRLF,
 * or behind which the next line's first byte is a dot, a NUL, or not here yet. */
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
 * Promise 3, the body automaton: from what the client sends between 354 and
 * CRLF.CRLF to what stands in the spool, every line of which ends in CRLF and
 * has no other CR or LF.  (A next hop that took another line end for one could
 * read a second end of data into the body: CVE-2023-51764 and its like.)
 *
 *	CRLF.CRLF	the end, and nothing else is: *end is set to 1
 *	CRLF.		the dot was stuffed: gone.  Not so behind a bare LF, which
 *			the client did not take for a line end
 *	CR...CRLF	one CRLF
 *	LF		CRLF
 *	CR		a space; a line end would let a sender make headers
 *	NUL...dot	at the start of a line: the dot alone, since some next hops
 *			drop NULs, and some end a line at one
 *
 * Takes up to n bytes from p, fewer only when *end; returns how many.  With
 * s->msg.in_bdat the dots mean nothing and there is no end.
 */
static size_t
body_filter(struct session *s, const char *p, size_t n, int *end)
{
	const char *q = p, *stop = p + n, *run;

	*end = 0;
	while (q < stop)
		switch (s->msg.body_state) {
		case BOL:		/* at the start, or behind CRLF */
			s->msg.body_state = LINE;
			if (*q == '.' && !s->msg.in_bdat) {
				s->msg.body_state = BOL_DOT;
				q++;
			}
			break;
		case BOL_DOT:
			s->msg.body_state = LINE;
			if (*q == '\r') {
				s->msg.body_state = BOL_DOT_CR;
				q++;
			}
			break;
		case BOL_DOT_CR:
			if (*q == '\n') {
				s->msg.body_state = BOL;
				*end = 1;
				return q + 1 - p;
			}
			s->msg.held_bytes = 1;
			s->msg.body_state = CRS;
			break;
		case LINE:		/* at a line's first byte; NULs held */
			if (*q == '\0') {
				s->msg.held_bytes++;
				q++;
				break;
			}
			if (*q == '.') {
				s->msg.held_bytes = 0;
				s->msg.has_dot_lines = 1;
			}
			spool_append_held(s, nuls);
			s->msg.body_state = TEXT;
			break;
		case TEXT:
			run = plain_text(q, stop);
			if (stop - run >= 2 && run[0] == '\r' && run[1] == '\n') {
				spool_append(s, q, run + 2 - q);
				s->msg.body_state = BOL;
				q = run + 2;
				break;
			}
			spool_append(s, q, run - q);
			q = run;
			if (q == stop)
				break;
			if (*q++ == '\n') {
				spool_append(s, crlf, 2);
				s->msg.body_state = LINE;
			} else {
				s->msg.held_bytes = 1;
				s->msg.body_state = CRS;
			}
			break;
		case CRS:		/* behind CRs in a line; they are held */
			if (*q == '\n') {
				s->msg.held_bytes = 0;
				spool_append(s, crlf, 2);
				s->msg.body_state = BOL;
				q++;
			} else if (*q == '\r') {
				s->msg.held_bytes++;
				q++;
			} else {
				spool_append_held(s, spaces);
				s->msg.body_state = TEXT;
			}
			break;
		}
	if (s->msg.held_bytes > MAXPENDING)
		fail_message(s, r_flood);
	return q - p;
}

/* No more will come (BDAT LAST); DATA ends with nothing held. */
static void
body_end(struct session *s)
{
	if (s->msg.held_bytes > 0) {
		spool_append_held(s, s->msg.body_state == CRS ? spaces : nuls);
		s->msg.body_state = TEXT;
	}
	if (s->msg.body_state == TEXT && !s->msg.relay_bdat)	/* DATA has whole lines only */
		spool_append(s, crlf, 2);
	spool_flush(s);
	if (s->msg.header_state == H_FIRST)
		s->msg.top = s->msg.size;
	if (s->msg.header_state == H_FIRST || s->msg.header_state == H_LINE)
		s->msg.header_end = s->msg.size;
}

/*
 * BODY.
 */

static void
message_begin(struct session *s)
{
	s->msg.size = s->msg.spool_size = s->msg.top = s->msg.header_end = 0;
	s->msg.body_state = BOL;
	s->msg.header_state = H_FIRST;
	s->msg.indented = 0;
	s->msg.held_bytes = 0;
	s->msg.has_dot_lines = s->result.failed = 0;
	if (s->conf->keepalives > 0)
		s->server.noop_at = now + s->conf->keepalives;
	s->msg.spool = spool_open(s->conf->tempdir, s->conf->debug_files);
	if (s->msg.spool == -1)
		fail_message_errno(s, "TempDirectory");
}

static void
enter_body(struct session *s, enum state state)
{
	enter(s, state);
	s->msg.rate_check_at = now + s->conf->timeout;
	s->msg.rate_bytes = 0;
}

static int
data_command(struct session *s, char *line, size_t n)
{
	(void)n;
	if (line[4 + strspn(line + 4, " \t")] != '\0') {
		refuse(s, r_no_args);
		return 0;
	}
	if (!s->env.have_mail || s->env.nrcpt == 0) {
		refuse(s, r_no_rcpt);
		return 0;
	}
	message_begin(s);
	client_reply(s, r_ready);
	enter_body(s, S_BODY);
	return 0;
}

/* The message is whole. */
static void
message_end(struct session *s)
{
	int64_t max = scan_limit(s);

	body_end(s);
	if (s->result.failed) {
		reject_message(s);
		return;
	}
	enter(s, S_SCAN);
	s->deadline = s->msg.dot_at + s->conf->scantimeout;
	if (max > 0 && s->msg.size > max)
		s->result.verdict = TOOBIG;
	else
		clamd_begin(s);
}

static int
st_body(struct session *s)
{
	struct buf *in = &s->client.in;
	size_t n;
	int end = 0;

	server_idle(s);
	if (!client_ready(s))
		return 0;
	if (buf_len(in) > 0) {
		n = body_filter(s, buf_head(in), buf_len(in), &end);
		spool_flush(s);
		buf_eat(in, n);
		if (end) {
			s->msg.dot_at = now;
			message_end(s);
		}
		return 1;
	}
	if (s->client.eof)
		return abort_transaction(s);
	return 0;
}

/*
 * CHUNK: the same for BDAT (RFC 3030), as it is when the next hop has it too.
 */

static int
bdat_command(struct session *s, char *line, size_t n)
{
	char *p = line + 4 + strspn(line + 4, " \t");
	int64_t size = parse_octets(p), limit = size_limit(s);
	int last;

	(void)n;
	p += strcspn(p, " \t");
	p += strspn(p, " \t");
	last = strcasecmp(p, "LAST") == 0;
	if (size == -1 || size == INT64_MAX || (*p != '\0' && !last)) {
		/* Where the next command begins nobody knows. */
		client_reply(s, r_bad_size);
		start_linger(s);
		return 0;
	}
	s->msg.chunk_left = size;
	s->msg.chunk_last = last;
	if (!s->msg.in_bdat) {
		if (!s->env.have_mail || s->env.nrcpt == 0) {
			s->result.failed = 1;
			defer_reply(s, r_no_rcpt);
		} else
			message_begin(s);
		s->msg.in_bdat = 1;
		s->msg.relay_bdat = s->server.chunking;
	}
	if (limit > 0 && s->msg.size + size > limit && !s->result.failed)
		fail_message(s, r_too_big, (long long)limit);
	enter_body(s, S_CHUNK);
	return 0;
}

/* A refused chunk ends the transaction: further ones find none, and get 503. */
static void
chunk_end(struct session *s)
{
	s->msg.dot_at = now;
	if (s->env.nrcpt == 0 && (s->server.peer.fd != -1 || s->rejected)) {
		s->msg.in_bdat = s->result.failed = 0;		/* there was none to end */
		str_free(&s->result.reply);
		enter(s, S_COMMAND);
		refuse(s, r_no_rcpt);
	} else if (s->result.failed)
		reject_message(s);
	else if (s->msg.chunk_last)
		message_end(s);
	else {
		client_reply(s, r_chunk, (unsigned long long)s->msg.size);
		enter(s, S_COMMAND);
	}
}

static int
st_chunk(struct session *s)
{
	struct buf *in = &s->client.in;
	size_t n = buf_len(in);
	int end;

	server_idle(s);
	if (!client_ready(s))
		return 0;
	if (s->msg.chunk_left == 0) {
		if (s->server.noop)		/* commands go on when it is answered */
			return 0;
		chunk_end(s);
		return 1;
	}
	if (n == 0) {
		if (s->client.eof)
			return abort_transaction(s);
		return 0;
	}
	if (n > s->msg.chunk_left)
		n = s->msg.chunk_left;
	if (s->msg.relay_bdat)
		spool_append(s, buf_head(in), n);
	else
		body_filter(s, buf_head(in), n, &end);
	spool_flush(s);
	s->msg.chunk_left -= n;
	buf_eat(in, n);
	return 1;
}

/*
 * SCAN: and what follows from what clamd said.
 */

/* Header's % sequences; and for DATA a dot more where a line begins with one. */
static int
expand(struct str *to, const struct session *s, const char *fmt)
{
	const char *v;
	int bad = 0;

	for (; *fmt != '\0' && !bad; fmt++) {
		if (*fmt == '.' && !s->msg.relay_bdat &&
		    (to->len == 0 || to->s[to->len - 1] == '\n') &&
		    str_add(to, ".", 1) == -1)
			return -1;
		if (*fmt != '%' || fmt[1] == '\0' ||
		    strchr("ild%", fmt[1]) == NULL) {
			bad = str_add(to, fmt, 1);
			continue;
		}
		switch (*++fmt) {
		case 'i':
			v = addr_text(&s->client_addr);
			break;
		case 'l':
			v = addr_text(&s->local_addr);
			break;
		case 'd':
			v = rfc5322_date();
			break;
		default:
			v = "%";
		}
		bad = str_add(to, v, strlen(v));
	}
	return bad != 0 || str_add(to, crlf, 2) == -1 ? -1 : 0;
}

/* What goes into the header section; -1: no memory. */
static int
choose_header(struct session *s)
{
	const char *h = s->conf->header;
	char own[NAMESZ + 64], *p;

	if (s->result.verdict == CLEAN)
		return h == NULL ? 0 : expand(&s->replay.header, s, h);
	if (s->result.verdict == VIRUS)
		format(own, sizeof own, "X-Virus-Infected: %s", s->result.text);
	else
		format(own, sizeof own, "X-Virus-Unscanned: %s",
		    s->result.verdict == TOOBIG ? "message too big" : s->result.text);
	for (p = own; *p != '\0'; p++)
		if (*p < ' ' || *p > 126)
			*p = '?';
	return str_add(&s->replay.header, own, p - own) == -1 ||
	    str_add(&s->replay.header, crlf, 2) == -1 ? -1 : 0;
}

/* Where it goes; -1: no memory.  The first line of a text, if it begins with a
 * blank, would go on with our header, and is parted from it by an empty one. */
static int
place_header(struct session *s)
{
	s->replay.header_off = s->replay.header.len >= 9 &&
	    strncasecmp(s->replay.header.s, "Received:", 9) == 0 ? s->msg.top : s->msg.header_end;
	return s->msg.indented && s->replay.header.len > 0 ?
	    str_add(&s->replay.header, crlf, 2) : 0;
}

static void
forward(struct session *s)
{
	if (choose_header(s) == -1 || place_header(s) == -1) {
		errno = ENOMEM;
		fail_message_errno(s, "header");
		reject_message(s);
		return;
	}
	s->replay.header_queued = s->replay.dot_queued = 0;
	s->replay.off = 0;
	s->replay.at_bol = 1;
	s->server.noop_at = 0;
	enter(s, S_DATA);
}

/* Promise 8: a variable of the VirusAction, in which each byte that is no text is
 * a question mark, but for that between several values (sep, if not NUL).  No
 * value: not known, not set. */
static int
env_add(char **env, size_t *n, const char *name, const char *value, char sep)
{
	size_t size, len;
	char *p, *v;

	if (value == NULL || *value == '\0')
		return 0;
	size = strlen(name) + strlen(value) + 2;
	if ((p = malloc(size)) == NULL)
		return -1;
	format(p, size, "%s=%s", name, value);
	for (v = p; *v != '\0'; v += len)
		if ((len = text_char(v, strlen(v))) == 0) {
			len = 1;
			if (*v != sep)
				*v = '?';
		}
	if (v[-1] == sep)
		v[-1] = '\0';
	env[(*n)++] = p;
	return 0;
}

extern char **environ;

static const char *const env_names[] = {
	"CLIENT", "EMAIL", "RECIPIENTS", "REMOTE", "REMOTE_HELO", "SENDER",
	"SERVER", "TMPDIR", "VIRUS",
};
#define NENV	(sizeof env_names / sizeof env_names[0])

static int
env_is_ours(const char *var)
{
	size_t i, n = strcspn(var, "=");

	for (i = 0; i < NENV; i++)
		if (strlen(env_names[i]) == n && memcmp(var, env_names[i], n) == 0)
			return 1;
	return 0;
}

/* The daemon's own environment and the nine; NULL: no memory. */
static char **
virus_env(struct session *s)
{
	const char *values[NENV];
	size_t n = 0, i, size = NENV + 1;
	char **env;
	int bad = 0;

	/* As in env_names. */
	values[0] = addr_text(&s->client_addr);
	values[1] = s->result.quarantined.s;
	values[2] = s->env.rcpt_list.s;
	values[3] = s->xforward.addr.s;
	values[4] = s->xforward.helo.s;
	values[5] = s->env.from.s;
	values[6] = addr_text(&s->server.addr);
	values[7] = s->conf->tempdir;
	values[8] = s->result.text;
	for (i = 0; environ[i] != NULL; i++)
		size++;
	if ((env = calloc(size, sizeof *env)) == NULL)
		return NULL;
	for (i = 0; environ[i] != NULL && !bad; i++)
		if (!env_is_ours(environ[i]))
			bad = (env[n++] = strdup(environ[i])) == NULL;
	for (i = 0; i < NENV && !bad; i++)
		bad = env_add(env, &n, env_names[i], values[i],
		    values[i] == s->env.rcpt_list.s ? '\n' : '\0');
	if (!bad)
		return env;
	env_free(env);
	return NULL;
}

/* The copy, if one was wanted, is safe. */
static void
virus_found(struct session *s)
{
	char **env;

	if (s->conf->virusaction != NULL) {
		if ((env = virus_env(s)) == NULL)
			slog(s, LOG_ERR, "VirusAction: not run: %s: %s",
			    strerror(errno), printable(s->conf->virusaction,
			    strlen(s->conf->virusaction)));
		else
			virusaction_start(s->id, s->conf->virusaction, env,
			    s->conf->timeout);
	}
	if (s->result.action == PASS) {
		forward(s);
		return;
	}
	s->result.failed = 0;		/* whatever became of the next hop meanwhile */
	if (s->result.action == BOUNCE)
		defer_reply(s, r_virus_bounce, s->result.text);
	else
		defer_reply(s, r_virus_drop);
	reject_message(s);
}

/* The answer has a NUL behind it. */
static void
on_quarantined(void *ctx, const char *answer, size_t n)
{
	struct session *s = ctx;

	s->result.child = NULL;
	session_wake(s);
	if (*answer != '/')
		slog(s, LOG_ERR, "quarantine in %s: %s", s->conf->tempdir,
		    n > 0 ? answer : "its process gave no answer");
	else if (str_set(&s->result.quarantined, answer, n) == -1) {
		slog(s, LOG_ERR, "quarantine in %s:", s->conf->tempdir);
		unlink(answer);
	}
}

static int
judge(struct session *s)
{
	switch (s->result.verdict) {
	case CLEAN:
		forward(s);
		return 1;
	case VIRUS:
		s->result.action = conf_action(s->conf, s->result.text);
		if (!s->conf->quarantine) {
			virus_found(s);
			return 1;
		}
		s->result.copying = 0;
		enter(s, S_QUARANTINE);
		return 1;
	default:
		break;
	}
	if (s->conf->failopen)
		forward(s);
	else {
		if (s->result.verdict == TOOBIG)
			defer_reply(s, r_not_scanned, (long long)s->msg.size);
		else
			defer_reply(s, r_no_scan, s->result.text);
		reject_message(s);
	}
	return 1;
}

static int
st_scan(struct session *s)
{
	if (client_gone(s))
		return abort_transaction(s);
	server_idle(s);
	if (s->result.failed) {
		clamd_cancel(s);
		reject_message(s);
		return 1;
	}
	if (s->result.verdict == UNKNOWN && !clamd_scan(s))
		return 0;
	return judge(s);
}

/*
 * QUARANTINE.
 */

static void
copy_start(struct session *s)
{
	s->result.copying = 1;
	s->result.child = spool_quarantine(s->msg.spool, s->conf->tempdir,
	    on_quarantined, s, s->deadline - now);
	if (s->result.child == NULL)
		slog(s, LOG_ERR, "quarantine in %s:", s->conf->tempdir);
}

static int
st_quarantine(struct session *s)
{
	server_idle(s);
	if (!s->result.copying) {
		if (client_gone(s))
			return abort_transaction(s);
		if (!child_room())
			return 0;
		copy_start(s);
	}
	if (s->result.child != NULL)	/* no copy without its line in the log */
		return 0;
	if (s->result.quarantined.len == 0) {
		/* Promise 1: not kept, so not taken; it comes again. */
		fail_message(s, r_local, "quarantine", "no copy could be made");
		reject_message(s);
		return 1;
	}
	slog(s, LOG_NOTICE, "quarantined virus file as: %s", s->result.quarantined.s);
	if (client_gone(s))
		return abort_transaction(s);
	virus_found(s);
	return 1;
}

/* TimeOut for the next piece, and no more than there is for all of it. */
static void
replay_extend(struct session *s)
{
	s->deadline = now + s->conf->timeout;
	if (s->deadline > s->replay.reply_deadline)
		s->deadline = s->replay.reply_deadline;
}

/* The client waits for ten minutes; for longer, if it has done so already. */
static void
begin_replay(struct session *s)
{
	enter(s, S_REPLAY);
	s->replay.reply_deadline = s->msg.dot_at + FINAL_TIME;
	if (s->replay.reply_deadline < now + s->conf->timeout)
		s->replay.reply_deadline = now + s->conf->timeout;
	replay_extend(s);
}

/*
 * DATA: only now does the next hop hear of the message.
 */

static int
st_data(struct session *s)
{
	struct reply r;
	char line[64];
	int n, got;

	if (!s->server.asked) {
		if (client_gone(s))
			return abort_transaction(s);
		if (!server_idle(s) && s->server.peer.fd != -1)
			return 0;
		if (s->state != S_DATA)
			return 1;
		if (s->result.failed) {
			reject_message(s);
			return 1;
		}
		n = format(line, sizeof line, "BDAT %lld LAST\r\n",
		    (long long)(s->msg.size + s->replay.header.len));
		s->server.asked = s->msg.relay_bdat ? server_put(s, line, n) :
		    server_put(s, "DATA\r\n", 6);
		if (s->server.asked && s->msg.relay_bdat)
			begin_replay(s);
		return s->server.asked;
	}
	if (!client_ready(s))
		return 0;
	if ((got = reply_get(s, &r)) != REPLY_COMPLETE)
		return got;
	if (r.code == 354) {
		reply_eat(s, &r);
		begin_replay(s);
		return 1;
	}
	if (r.code < 400)
		return server_lost(s, "its reply makes no sense");
	s->server.asked = 0;
	log_refusal(s, &r);
	defer_relay(s, &r);
	reply_eat(s, &r);
	if (r.code == 421)
		peer_close(&s->server.peer);		/* RESET has nobody to ask */
	reject_message(s);
	return 1;
}

/*
 * REPLAY.
 */

/* The next hop speaks before it has everything, and gets no more of it.  Its
 * refusal is the verdict; a promise would be one for a message that it does not
 * have. */
static int
early_reply(struct session *s)
{
	struct reply r;
	int got;

	if ((got = reply_get(s, &r)) != REPLY_COMPLETE)
		return got;
	if (r.code < 400)
		return server_lost(s, "it accepted a message that it did not have");
	log_refusal(s, &r);
	mail_done(s, r.text, r.len);
	return relay_and_close(s, &r);
}

/*
 * Up to SMALL bytes of the spool go out by way of `out', so that a small
 * message leaves with its header and its dot in one segment, and so do the last
 * ones of a large one.
 */
static int
replay_copy(struct session *s, off_t left)
{
	static char chunk[TAIL];
	struct buf *out = &s->server.peer.out;
	const char *p, *stop, *nl;
	ssize_t n = left < TAIL ? left : TAIL;

	if (!buf_ready(out, 2 * TAIL))		/* every byte may be a dot */
		return 0;
	n = pread(s->msg.spool, chunk, n, scan_line_len + s->replay.off);
	if (n <= 0)
		return server_lost(s, "the spool cannot be read");
	s->replay.off += n;
	if (!s->msg.has_dot_lines || s->msg.relay_bdat) {
		buf_put(out, chunk, n);
		return 1;
	}
	/* Promise 3: lines that begin with a dot get another one. */
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
	r = peer_sendfile(&s->server.peer, s->msg.spool, &at, left);
	if (at != (off_t)scan_line_len + s->replay.off)
		replay_extend(s);
	s->replay.off = at - scan_line_len;
	return r && --s->io_budget > 0;
}

/*
 * Promise 1: whoever went away before the last bytes left has delivered
 * nothing.  Nor may a reply that is here already be taken for one to them.
 */
static void
recheck_peers(struct session *s)
{
	if (!s->client.eof)
		client_fill(s);
	peer_reset(&s->client);
	if (!s->server.peer.eof && peer_unread(&s->server.peer))
		s->server.peer.err = 1;
}

/* The last bytes stand in `out'. */
static int
replay_queued(const struct session *s)
{
	return s->replay.header_queued && s->replay.off == s->msg.size && (s->msg.relay_bdat || s->replay.dot_queued);
}

/* They have left: from here on a reply is the reply. */
static int
replay_sent(const struct session *s)
{
	return replay_queued(s) && buf_len(&s->server.peer.out) == 0 &&
	    !s->server.peer.err;
}

/* What comes next; 0: when there is room for it. */
static int
replay_next(struct session *s)
{
	struct buf *out = &s->server.peer.out;
	off_t left = (s->replay.header_queued ? s->msg.size : s->replay.header_off) - s->replay.off;

	if (left > TAIL && (!s->msg.has_dot_lines || s->msg.relay_bdat))
		return replay_file(s, left - TAIL);
	if (left > 0)
		return replay_copy(s, left);
	if (s->replay.header_queued)
		return s->replay.dot_queued = server_put(s, ".\r\n", 3);
	if (!buf_ready(out, s->replay.header.len))
		return 0;
	buf_put(out, s->replay.header.s, s->replay.header.len);
	return s->replay.header_queued = 1;
}

static int
st_replay(struct session *s)
{
	if (replay_sent(s)) {
		enter(s, S_FINAL);
		s->deadline = s->replay.reply_deadline;
		return 1;
	}
	if (replay_queued(s))
		recheck_peers(s);
	if (client_gone(s))
		return abort_transaction(s);
	if (s->server.peer.err == PEER_LOCAL || (s->server.peer.err &&
	    buf_len(&s->server.peer.in) == 0 && !s->server.peer.eof &&
	    !peer_fill(&s->server.peer)))
		return server_lost(s, "no writing to it, or no reading of the spool");
	if (buf_len(&s->server.peer.in) > 0 || s->server.peer.eof) {
		s->server.peer.err = 1;	/* what waits in `out' is not sent */
		return client_ready(s) ? early_reply(s) : 0;
	}
	return replay_queued(s) ? 0 : replay_next(s);
}

/*
 * FINAL: the message is the next hop's.  Its word is awaited even if the client
 * has left, for the log.
 */

static int
st_final(struct session *s)
{
	struct reply r;
	int got;

	if (!client_ready(s))
		return 0;
	if ((got = reply_get(s, &r)) != REPLY_COMPLETE)
		return got;
	if (r.class == 3)
		return server_lost(s, "its reply makes no sense");
	s->server.asked = 0;
	mail_done(s, r.text, r.len);
	if (r.class != 2)
		log_refusal(s, &r);
	relay(s, &r);
	reply_eat(s, &r);
	transaction_reset(s);
	if (r.code == 421)
		start_linger(s);
	else
		enter(s, S_COMMAND);
	return 1;
}

/*
 * RESET: the next hop forgets the transaction, then the client hears why.
 */

static int
st_reset(struct session *s)
{
	struct reply r;
	int ok, got;

	if (s->client.err) {
		session_kill(s);
		return 1;
	}
	if (!client_ready(s))
		return 0;
	if (!s->server.asked) {
		if (!server_idle(s) && s->server.peer.fd != -1)
			return 0;
		if (s->state != S_RESET)
			return 1;
		if (s->server.peer.fd == -1) {
			send_deferred(s);
			start_linger(s);
			return 1;
		}
		return s->server.asked = server_put(s, "RSET\r\n", 6);
	}
	if ((got = reply_get(s, &r)) != REPLY_COMPLETE)
		return got;
	ok = r.class == 2;
	reply_eat(s, &r);
	s->server.asked = 0;
	send_deferred(s);
	transaction_reset(s);
	if (ok)
		enter(s, S_COMMAND);
	else
		start_linger(s);
	return 1;
}

/*
 * LINGER: a socket that is closed with something unread in it is reset, and a
 * reset takes our last line with it.
 */

static int
st_linger(struct session *s)
{
	if (s->client.err) {
		session_kill(s);
		return 1;
	}
	buf_free(&s->client.in);
	if (buf_len(&s->client.out) > 0)
		return 0;
	if (!s->shut) {
		s->shut = 1;
		shutdown(s->client.fd, SHUT_WR);
		s->deadline = now + LINGER_TIME;
	}
	if (!s->client.eof)
		return 0;
	session_kill(s);
	return 1;
}

/*
 * Time and turns.
 */

static void
timed_out(struct session *s)
{
	slog(s, LOG_DEBUG, "%s: time is up", states[s->state].name);
	switch (s->state) {
	case S_CONNECT:			/* st_connect() looks for itself */
	case S_DEAD:
		break;
	case S_PROXY:
		s->client.eof = 1;	/* no more of it will be read */
		break;
	case S_COMMAND:
	case S_AUTH:
	case S_BODY:
	case S_CHUNK:
		slog(s, LOG_WARNING, "CLIENT: network read operation timed out%s",
		    bare_lf(s));
		client_reply(s, r_idle);
		start_linger(s);
		break;
	case S_SCAN:
		clamd_timeout(s);
		s->result.verdict = FAILED;
		break;
	case S_QUARANTINE:
		slog(s, LOG_ERR, "quarantine in %s: no copy was %s within TimeOut",
		    s->conf->tempdir, s->result.copying ? "made" : "begun");
		s->result.copying = 1;
		quarantine_drop(s);
		break;
	case S_LINGER:
		session_kill(s);
		break;
	default:
		server_lost(s, "no answer in time");
	}
}

static int
is_body(const struct session *s)
{
	return s->state == S_BODY || s->state == S_CHUNK;
}

/* A body may be slow, but not for ever. */
static void
rate_check(struct session *s)
{
	if (!is_body(s) || now < s->msg.rate_check_at)
		return;
	if (s->msg.rate_bytes < (uint64_t)(s->conf->timeout / SECOND) * SLOWEST_BODY)
		timed_out(s);
	s->msg.rate_check_at = now + s->conf->timeout;
	s->msg.rate_bytes = 0;
}

/* Write what can be written; 1: there is room that was not there before. */
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
	if (states[s->state].clock == C_IDLE && buf_len(&s->client.out) < c)
		s->deadline = now + s->conf->timeout;
	if (s->state == S_REPLAY)
		replay_extend(s);
	return 1;
}

void
session_run(struct session *s)
{
	s->ran_at = now;
	s->io_budget = 4;
	if (now >= s->deadline)
		timed_out(s);
	rate_check(s);
	do {
		while (s->state != S_DEAD && states[s->state].step(s))
			;
	} while (s->state != S_DEAD && flush(s) && s->io_budget > 0);
	s->runnable = 0;
	if (peer_settle(&s->client) + peer_settle(&s->server.peer) +
	    peer_settle(&s->scan.peer) != 0 && s->state != S_DEAD) {
		slog(s, LOG_ERR, "out of memory: session ends");
		session_kill(s);
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
	if ((states[s->state].from & RESET) && (revents & POLLERR))
		peer_reset(&s->client);
	session_run(s);
}

static void
on_server(void *arg, int revents)
{
	struct session *s = arg;

	if (s->state == S_DEAD || s->server.peer.fd == -1)
		return;
	if (s->server.peer.connecting)
		s->server.peer.connecting = 0;
	else if (revents & POLLIN)
		peer_fill(&s->server.peer);
	session_run(s);
}

static void
on_clamd(void *arg, int revents)
{
	struct session *s = arg;

	if (s->state == S_DEAD || s->scan.peer.fd == -1)
		return;
	if (s->scan.peer.connecting)
		s->scan.peer.connecting = 0;
	else if (revents & POLLIN)
		peer_fill(&s->scan.peer);
	session_run(s);
}

static int
wants(const struct session *s, const struct peer *p, int who)
{
	int events = 0;

	if ((states[s->state].from & who) && !p->eof &&
	    buf_len(&p->in) < BUFSZ)
		events |= POLLIN;
	if (buf_len(&p->out) > 0 || p->connecting)
		events |= POLLOUT;
	return events;
}

/* poll() reports a reset without being asked for any event.  Not so on a unix
 * socket, where it reports the end of the input like this, again and again. */
static int
wants_reset(const struct session *s)
{
	return (states[s->state].from & RESET) &&
	    s->peer_addr.u.sa.sa_family != AF_UNIX;
}

static void
sooner(struct session *s, int64_t t)
{
	if (t != 0 && t < s->next_time)
		s->next_time = t;
}

void
session_poll(struct session *s)
{
	int client = wants(s, &s->client, CLIENT);
	int server = s->server.peer.fd == -1 ? 0 : wants(s, &s->server.peer, SERVER);

	if (s->state == S_REPLAY && buf_len(&s->server.peer.in) == 0)
		server |= POLLOUT;
	if (client != 0 || wants_reset(s))
		poll_add(s->client.fd, client, on_client, s);
	if (server != 0)
		poll_add(s->server.peer.fd, server, on_server, s);
	if (s->scan.peer.fd != -1 && clamd_events(s) != 0)
		poll_add(s->scan.peer.fd, clamd_events(s), on_clamd, s);
	s->next_time = s->deadline;
	sooner(s, clamd_deadline(s));
	if (is_body(s))
		sooner(s, s->msg.rate_check_at);
	/* As in hop_listen(): a time at which nothing is done makes us spin. */
	if ((is_body(s) || s->state == S_SCAN || s->state == S_QUARANTINE) &&
	    !s->server.noop && !s->result.failed && buf_len(&s->server.peer.in) == 0)
		sooner(s, s->server.noop_at);
	poll_deadline(s->next_time);
}

/* A client that does not close its connection must not delay the end. */
static void
linger_less(struct session *s)
{
	if (s->state == S_LINGER && s->deadline > now + STOP_LINGER_TIME)
		s->deadline = now + STOP_LINGER_TIME;
}

void
session_shutdown(struct session *s, int at_once)
{
	switch (s->state) {
	case S_DEAD:
		return;
	case S_PROXY:
	case S_CONNECT:
	case S_GREETING:
	case S_AUTH:
		break;
	case S_COMMAND:
		if (s->env.have_mail && !at_once)
			return;
		break;
	case S_LINGER:
		if (at_once)
			session_kill(s);
		linger_less(s);
		return;
	case S_DATA:
	case S_REPLAY:
	case S_FINAL:
	case S_RESET:
		if (at_once) {
			server_lost(s, "no time left to wait for it");
			session_run(s);
		}
		return;
	default:
		if (!at_once)
			return;
	}
	client_reply(s, r_stopping);
	start_linger(s);
	session_run(s);
	linger_less(s);
}

void
session_refuse(int fd)
{
	char line[NOTESZ];
	int i, n = format(line, sizeof line, "%s\r\n", r_busy);

	send(fd, line, n, MSG_NOSIGNAL | MSG_DONTWAIT);
	shutdown(fd, SHUT_WR);
	/* Unread bytes would turn the close into a reset. */
	for (i = 0; i < 64; i++)
		if (recv(fd, line, sizeof line, MSG_DONTWAIT) <= 0)
			break;
	close(fd);
}

void
session_free(struct session *s)
{
	transaction_reset(s);
	str_free(&s->helo);
	str_free(&s->result.reply);
	peer_close(&s->client);
	peer_close(&s->server.peer);
	peer_close(&s->scan.peer);
	conf_put(s->conf);
	free(s);
}
