/*
 * clamd(8): the clamds and their health, the scan queue, INSTREAM and PING.
 *
 * Each scan has a connection of its own, opened when the message is complete.
 * clamd gets the bytes of the spool (INSTREAM).  No function here blocks: a
 * step that must wait returns 0, and is called again after an event.
 */

#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>

#include "clamsmtpd.h"

#define ANSWERSZ	2048		/* bytes; an answer is one line */
#define TAILSZ		(BUFSZ / 2)	/* bytes of a message that are copied */

static const char no_address[] = "no address found for this name";

static struct clamd *clamds;		/* of all confs and scans */

/* Sessions that wait for a slot, the oldest first. */
static struct session *queue, **queue_end = &queue;

/* An abandoned scan: its session has ended or timed out.  clamd finishes the
 * scan even when the socket is closed, so the scan keeps its slot until clamd
 * answers or closes the connection. */
struct abandoned {
	struct peer peer;
	struct clamd *at;
	int64_t	 until;
	struct abandoned *next;
};
static struct abandoned *abandoned;

struct clamd *
clamd_get(struct target *t)
{
	struct clamd *c;

	for (c = clamds; c != NULL && strcmp(c->target->text, t->text) != 0;)
		c = c->next;
	if (c == NULL && (c = calloc(1, sizeof *c)) != NULL) {
		c->target = t;
		t->refs++;
		c->next = clamds;
		clamds = c;
	}
	if (c != NULL)
		c->refs++;
	target_put(t);
	return c;
}

void
clamd_put(struct clamd *c)
{
	struct clamd **p;

	if (--c->refs > 0)
		return;
	for (p = &clamds; *p != c; p = &(*p)->next)
		;
	*p = c->next;
	target_put(c->target);
	free(c);
}

/*
 * Health.  A failure is logged at once and then once a minute while scans fail.
 * The recovery is logged once.
 */

static void
clamd_complain(struct clamd *c, const char *why)
{
	if (strcmp(c->complaint, why) == 0 && now < c->quiet_until)
		return;
	format(c->complaint, sizeof c->complaint, "%s", why);
	c->quiet_until = now + REPEAT_TIME;
	logmsg(LOG_ERR, "clamd %s: %s", target_text(c->target), why);
}

/* Record that the address to which fd is connected works.  It is address i of
 * the target, unless a look-up has changed the list since. */
static void
clamd_worked(struct clamd *c, int i, int fd)
{
	struct addr a = c->target->addr[i];

	if (c->target->name != NULL) {
		a.len = sizeof a.u;
		if (getpeername(fd, &a.u.sa, &a.len) == -1)
			return;
	}
	target_worked(c->target, &a);
}

static void
clamd_well(struct clamd *c)
{
	c->dead_until = 0;
	c->on_trial = 0;
	if (c->complaint[0] == '\0')
		return;
	c->complaint[0] = '\0';
	logmsg(LOG_NOTICE, "clamd %s: works again", target_text(c->target));
}

/*
 * Slots.
 */

static void
slot_take(struct session *s, struct clamd *c)
{
	c->running++;
	count.scans_running++;
	c->refs++;
	s->scan.clamd = c;
}

static void queue_run(void);

static void
slot_free(struct clamd *c)
{
	c->running--;
	count.scans_running--;
	clamd_put(c);
	queue_run();
}

static void
queue_leave(struct session *s)
{
	struct session **p;

	for (p = &queue; *p != s; p = &(*p)->scan.next)
		;
	*p = s->scan.next;
	if (*p == NULL)
		queue_end = p;
	s->conf->waiting--;
	count.scans_waiting--;
}

/* Returns 1 when this clamd may get another scan, else 0.  On trial it gets one
 * at a time.  Abandoned scans do not count then, or one message that clamd
 * cannot finish would keep out all others. */
static int
has_slot(const struct clamd *c, const struct conf *conf)
{
	return c->running < conf->maxscans &&
	    (!c->on_trial || c->running == c->abandoned);
}

/* Returns the first clamd in file order that is alive, has a free slot and has
 * not failed this message.  If none is alive, returns the first dead one with a
 * free slot, since it may have recovered.  Otherwise returns NULL, and sets
 * *busy when the session should wait for a slot. */
static struct clamd *
clamd_choose(struct session *s, int *busy)
{
	struct clamd *c;
	int dead, i;

	*busy = 0;
	for (dead = 0; dead <= 1 && !*busy; dead++)
		for (i = 0; i < s->conf->nclamd; i++) {
			c = s->conf->clamd[i];
			if (s->scan.tried & (uint32_t)1 << i ||
			    (c->dead_until > now) != dead)
				continue;
			if (has_slot(c, s->conf))
				return c;
			*busy = 1;
		}
	return NULL;
}

/* Hand free slots to the waiting scans, the oldest first.  A scan that has
 * tried every clamd leaves the queue as FAILED. */
static void
queue_run(void)
{
	const struct conf *full = NULL;	/* no slot with these settings */
	struct session *s, *next;
	struct clamd *c;
	int busy;

	for (s = queue; s != NULL; s = next) {
		next = s->scan.next;
		if (s->conf == full && full->waiting == count.scans_waiting)
			break;
		if (s->conf == full)
			continue;
		c = clamd_choose(s, &busy);
		if (c == NULL && busy) {
			if (s->scan.tried == 0)
				full = s->conf;
			continue;
		}
		queue_leave(s);
		session_wake(s);
		s->scan.phase = c != NULL ? SC_CONNECT : SC_NONE;
		if (c != NULL)
			slot_take(s, c);
		else
			s->result.verdict = FAILED;
	}
}

/* Append the session to the queue, or put it first when it tries again. */
static void
queue_join(struct session *s, int again)
{
	struct session **p = again ? &queue : queue_end;

	s->scan.next = *p;
	*p = s;
	if (p == queue_end)
		queue_end = &s->scan.next;
	s->scan.phase = SC_QUEUE;
	s->conf->waiting++;
	count.scans_waiting++;
	queue_run();
}

/* Release the slot, if the scan has one, and reset the scan.  Only the record
 * of the clamds that have failed stays. */
static void
scan_reset(struct session *s)
{
	struct clamd *c = s->scan.clamd;

	peer_close(&s->scan.peer);
	s->scan = (struct scan){ .peer.fd = -1, .tried = s->scan.tried };
	if (c != NULL)
		slot_free(c);
}

/* This clamd has failed the message: try the next one.  Returns 1. */
static int
scan_failed(struct session *s, int dead, const char *why)
{
	struct clamd *c = s->scan.clamd;
	int i;

	slog(s, LOG_DEBUG, "clamd %s: %s", target_text(c->target), why);
	format(s->result.text, sizeof s->result.text, "%s", why);
	clamd_complain(c, why);
	c->failures++;
	if (dead) {
		c->dead_until = now + RETRY_TIME;
		target_resolve(c->target, 1);
	}
	for (i = 0; i < s->conf->nclamd; i++)
		if (s->conf->clamd[i] == c)
			s->scan.tried |= (uint32_t)1 << i;
	scan_reset(s);
	queue_join(s, 1);
	return 1;
}

/*
 * The steps of a scan.  Each returns 1 to go on at once, or 0 to wait.
 */

void
clamd_begin(struct session *s)
{
	s->scan = (struct scan){ .peer.fd = -1 };
	s->result.verdict = UNKNOWN;
	s->result.text[0] = '\0';
	queue_join(s, 0);
}

/* Detect a host that has vanished within a minute, and not after
 * ABANDON_LIMIT.  If the kernel refuses an option, its own times stay. */
static void
keep_alive(int fd)
{
	int on = 1, idle = 30, interval = 10, probes = 3;	/* s */

	setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
	setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof probes);
}

/* Queue the command and the length of the only chunk.  They leave together with
 * the data that follows. */
static int
scan_command(struct session *s)
{
	static const char command[] = "zINSTREAM";
	struct target *t = s->scan.clamd->target;
	uint32_t length = htonl(scan_line_len + s->msg.size);

	s->scan.deadline = 0;
	if (!buf_ready(&s->scan.peer.out, sizeof command + sizeof length))
		return 0;
	if (t->addr[s->scan.addr].u.sa.sa_family != AF_UNIX)
		keep_alive(s->scan.peer.fd);
	slog(s, LOG_DEBUG, "CLAMAV > %s (%s)", command, target_text(t));
	buf_put(&s->scan.peer.out, command, sizeof command);
	buf_put(&s->scan.peer.out, &length, sizeof length);
	s->scan.phase = SC_SEND;
	return 1;
}

static int
scan_connect(struct session *s)
{
	struct scan *c = &s->scan;
	struct target *t = c->clamd->target;
	char why[NOTESZ / 4];
	int err;

	if (c->peer.fd == -1) {
		if (now < c->deadline)
			return 0;
		c->addr = target_next(t, c->addrs_tried);
		if (c->addr == RESOLVING)
			return 0;
		if (c->addr == NO_ADDR)
			return scan_failed(s, 1, no_address);
	}
	switch (peer_connect(&c->peer, &t->addr[c->addr], &c->deadline,
	    CONNECT_TIME)) {
	case 1:
		return scan_command(s);
	case 0:
		return 0;
	}
	err = errno;
	if (err == EAGAIN) {		/* clamd's backlog is full */
		c->deadline = now + CONNECT_RETRY;
		return 0;
	}
	c->deadline = 0;
	c->addrs_tried |= 1U << c->addr;
	if (target_next(t, c->addrs_tried) != NO_ADDR)
		return 1;
	format(why, sizeof why, "connect: %s%s%s", strerror(err),
	    err == EACCES ? " for user " : "",
	    err == EACCES ? user_name() : "");
	return scan_failed(s, err != EMFILE && err != ENFILE &&
	    err != ENOMEM && err != ENOBUFS, why);
}

/* Copy the last n bytes of the message to `out' and append the empty chunk that
 * ends the stream.  A small message leaves in one write with everything before
 * it. */
static int
send_tail(struct session *s, size_t n)
{
	static const char end[4];
	struct buf *out = &s->scan.peer.out;
	ssize_t r;

	if (!buf_ready(out, n + sizeof end))
		return 0;
	r = spool_read(&s->msg.spool, out->b + out->w, n, s->scan.sent);
	if (r <= 0) {
		s->scan.peer.err = PEER_LOCAL;
		s->scan.peer.eof = 1;
		return 1;
	}
	out->w += r;
	s->scan.sent += r;
	if ((size_t)r == n) {
		buf_put(out, end, sizeof end);
		s->scan.queued = 1;
	}
	return 1;
}

static int
send_next(struct session *s)
{
	struct scan *c = &s->scan;
	off_t n = scan_line_len + s->msg.size - c->sent;

	if (s->msg.spool.mem != NULL || n <= TAILSZ)
		return send_tail(s, n);
	return peer_drain(&c->peer, 1) &&
	    peer_sendfile(&c->peer, s->msg.spool.fd, &c->sent, n - TAILSZ) &&
	    --s->io_budget > 0;
}

static int
scan_send(struct session *s)
{
	struct scan *c = &s->scan;
	struct peer *p = &s->scan.peer;

	/* Promise 4: an OK before the last bytes is an error, so read first. */
	if (c->queued && !p->eof)
		peer_fill(p, 0);
	/* An early answer, or the end of the connection, is the result. */
	if (p->err || p->eof || buf_len(&p->in) > 0) {
		buf_free(&p->out);
		c->phase = SC_ANSWER;
		return 1;
	}
	if (c->sent > 0 && !peer_drain(p, !c->queued))
		return 0;
	if (p->err)
		return 1;
	if (!c->queued)
		return send_next(s);
	c->scanning = 1;
	c->phase = SC_ANSWER;
	return 1;
}

/* Promise 4: returns CLEAN only when the n bytes of the answer (without
 * terminator) are exactly an OK.  VIRUS: name has it.  Anything not understood
 * is FAILED. */
static enum verdict
clamd_parse(const char *p, size_t n, char name[NAMESZ])
{
	static const char stream[] = "stream: ", found[] = " FOUND";
	size_t label = sizeof stream - 1, len = sizeof found - 1;

	if (memchr(p, '\n', n) != NULL)
		return FAILED;		/* several lines */
	if (strstr(printable(p, n), "INSTREAM size limit exceeded") != NULL)
		return TOOBIG;
	if (n <= label || memcmp(p, stream, label) != 0)
		return FAILED;
	if (mem_equal(p + label, n - label, "OK"))
		return CLEAN;
	if (n > label + len && mem_equal(p + n - len, len, found)) {
		n -= label + len;
		if (n > NAMESZ - 1)
			n = NAMESZ - 1;
		memcpy(name, p + label, n);
		ascii_clean(name, n, "", '_');
		name[n] = '\0';
		return VIRUS;
	}
	return FAILED;
}

const int scan_limits[NBUCKETS - 1] = {		/* ms */
	10, 30, 100, 300, 1000, 3000, 10000, 30000
};

static void
scan_count(struct session *s)
{
	int64_t ms = now - s->msg.dot_at;
	int i;

	for (i = 0; i < NBUCKETS - 1 && ms > scan_limits[i]; i++)
		;
	count.scans[i]++;
	count.scan_ms += ms;
	s->result.verdict_at = now;
}

/*
 * Handle clamd's answer: n bytes, without the terminator.  whole is 0 if there
 * was no terminator or data followed it.  Such an answer can only be an error.
 */
static int
scan_answer(struct session *s, const char *p, size_t n, int whole)
{
	struct clamd *c = s->scan.clamd;
	char why[NOTESZ / 4];
	enum verdict v;

	slog(s, LOG_DEBUG, "CLAMAV < %s", printable(p, n));
	v = clamd_parse(p, n, s->result.text);
	if (!whole && v != TOOBIG)
		v = FAILED;
	if (v == CLEAN && !s->scan.scanning)
		return scan_failed(s, 0,
		    "it sent OK before the end of the message");
	if (v == FAILED) {
		format(why, sizeof why, "unexpected answer \"%.*s\"%s", 200,
		    printable(p, n),
		    whole ? "" : " (incomplete)");
		return scan_failed(s, 0, why);
	}
	clamd_worked(c, s->scan.addr, s->scan.peer.fd);
	clamd_well(c);
	s->result.verdict = v;
	scan_count(s);
	scan_reset(s);
	return 1;
}

static int
scan_read(struct session *s)
{
	struct buf *in = &s->scan.peer.in;
	const char *p, *end;
	size_t n;

	/* Read everything available, so that data after the answer is seen. */
	if (memchr(buf_head(in), '\0', buf_len(in)) != NULL)
		while (!s->scan.peer.eof && peer_fill(&s->scan.peer, 0))
			;
	p = buf_head(in);
	n = buf_len(in);
	end = memchr(p, '\0', n);
	if (end != NULL && n <= ANSWERSZ)
		return scan_answer(s, p, end - p, end + 1 == p + n);
	if (n > ANSWERSZ)
		return scan_failed(s, 0, "answer too long");
	if (!s->scan.peer.eof)
		return 0;
	if (s->scan.peer.err == PEER_LOCAL)
		return scan_failed(s, 0, "cannot send the message: no memory, "
		    "or TempDirectory cannot be read");
	if (n == 0)
		return scan_failed(s, 1,
		    "connection closed without an answer");
	/* Some errors end in a newline even after a z command. */
	return scan_answer(s, p, p[n - 1] == '\n' ? n - 1 : n, 0);
}

int
clamd_scan(struct session *s)
{
	static int (*const step[])(struct session *) = {
		[SC_CONNECT] = scan_connect, [SC_SEND] = scan_send,
		[SC_ANSWER] = scan_read,
	};

	while (s->scan.phase != SC_NONE)
		if (s->scan.phase == SC_QUEUE || !step[s->scan.phase](s))
			return 0;	/* queue_run() ends SC_QUEUE */
	return 1;
}

void
clamd_cancel(struct session *s)
{
	struct abandoned *a;

	if (s->scan.phase == SC_QUEUE)
		queue_leave(s);
	if (s->scan.clamd != NULL && s->scan.scanning && s->scan.peer.fd != -1 &&
	    (a = calloc(1, sizeof *a)) != NULL) {
		a->peer.fd = s->scan.peer.fd;
		a->at = s->scan.clamd;
		a->until = now + ABANDON_LIMIT;
		a->next = abandoned;
		abandoned = a;
		a->at->abandoned++;
		s->scan.peer.fd = -1;
		s->scan.clamd = NULL;
		queue_run();		/* a clamd on trial has a slot again */
	}
	scan_reset(s);
}

void
clamd_timeout(struct session *s)
{
	static int64_t quiet_until;
	struct clamd *c = s->scan.clamd;

	format(s->result.text, sizeof s->result.text, "no %s within ScanTimeOut",
	    c != NULL ? "verdict" : "free slot");
	if (c != NULL) {
		clamd_complain(c, s->result.text);
		c->failures++;
		c->dead_until = now + RETRY_TIME;
		c->on_trial = 1;
	} else if (now >= quiet_until) {
		quiet_until = now + REPEAT_TIME;
		logmsg(LOG_ERR, "clamd %s: %s; set MaxScans "
		    "to clamd's MaxThreads", target_text(s->conf->clamd[0]->target),
		    s->result.text);
	}
	clamd_cancel(s);
}

static void
on_abandoned(void *arg, int revents)
{
	struct abandoned *a = arg;

	(void)revents;
	a->until = now;		/* an answer or EOF: clamd has finished */
}

/*
 * The health check, at the start and for the status page.  The clamds get a PING
 * one after the other, until one answers.  With a status page all of them do,
 * and each that answers gets a VERSION as well.
 */

static struct {
	const struct conf *conf;	/* NULL: none is under way */
	int	 report;		/* log a warning if none answers */
	int	 which;			/* index of the clamd, */
	int64_t	 clamd_until;		/* its deadline, */
	int	 addr;			/* index of its address, */
	unsigned addrs_tried;		/* and bits of those that were tried */
	int	 version;		/* there was a PONG: VERSION is next */
	struct peer peer;
	int64_t	 until;			/* deadline of address or look-up */
	int64_t	 ended;			/* when the last check ended; 0: never */
	int	 well;			/* a clamd has answered */
	char	 why[NOTESZ / 4];
} ping = { .peer.fd = -1 };

static void
ping_why(const char *why)
{
	format(ping.why, sizeof ping.why, "clamd %s: %s",
	    target_text(ping.conf->clamd[ping.which]->target), why);
}

/* Begin with clamd number n. */
static void
ping_clamd(int n)
{
	ping.which = n;
	ping.clamd_until = now + PING_TIME / ping.conf->nclamd;
	ping.addrs_tried = 0;
	ping.version = 0;
}

/* Two digits; the first may be a blank. */
static int
two_digits(const char *p)
{
	return (p[0] & 15) * 10 + (p[1] & 15);
}

/* Returns the time that asctime(3) writes like this, in UTC, or 0. */
static int64_t
asctime_parse(const char *p)
{
	static const char month[] = "JanFebMarAprMayJunJulAugSepOctNovDec";
	struct tm t = { 0 };

	if (strlen(p) != 24)		/* Tue Nov 25 08:31:09 2026 */
		return 0;
	while (t.tm_mon < 12 && memcmp(month + t.tm_mon * 3, p + 4, 3) != 0)
		t.tm_mon++;
	t.tm_mday = two_digits(p + 8);
	t.tm_hour = two_digits(p + 11);
	t.tm_min = two_digits(p + 14);
	t.tm_sec = two_digits(p + 17);
	t.tm_year = two_digits(p + 20) * 100 + two_digits(p + 22) - 1900;
	return t.tm_mon == 12 || t.tm_year < 70 ? 0 : timegm(&t);
}

/* Read the signatures from an answer such as "ClamAV 1.4.3/27800/Tue Nov 25
 * 08:31:09 2026".  Without a database clamd names its version only, and clamd 1.5
 * may have VERSION switched off. */
static void
ping_signatures(struct clamd *c, const char *p)
{
	c->signatures = c->signatures_at = 0;
	if (strncmp(p, "ClamAV ", 7) != 0 || (p = strchr(p, '/')) == NULL)
		return;
	if (parse_number(p + 1, "/", &c->signatures) != 1)
		c->signatures = 0;
	else if ((p = strchr(p + 1, '/')) != NULL)
		c->signatures_at = asctime_parse(p + 1);
}

/* A clamd has answered PING.  One that timed out may still be stuck, since clamd
 * answers PING while all its threads hang: a scan must show it. */
static void
ping_pong(struct clamd *c)
{
	clamd_worked(c, ping.addr, ping.peer.fd);
	if (c->dead_until != 0 && !c->on_trial) {
		clamd_well(c);
		queue_run();
	}
	ping.well = 1;
	if (ping.conf->status != NULL)
		ping.version = 1;
	else
		ping_clamd(ping.conf->nclamd);
}

/* The steps of a check.  Each returns 0 to wait, or 1 when another command,
 * address or clamd is next. */

static int
ping_answer(struct clamd *c)
{
	struct peer *p = &ping.peer;
	const char *answer, *end;
	char why[NOTESZ / 4];
	size_t n;

	if (!p->eof)
		peer_fill(p, 0);
	answer = buf_head(&p->in);
	n = buf_len(&p->in);
	end = memchr(answer, '\0', n);
	if (!p->eof && end == NULL && n <= ANSWERSZ && now < ping.until) {
		peer_settle(p);
		return 0;
	}
	if (ping.version) {
		ping_signatures(c, end != NULL ? answer : "");
		ping_clamd(ping.which + 1);
	} else if (n == 5 && memcmp(answer, "PONG", 5) == 0)
		ping_pong(c);
	else {
		format(why, sizeof why, "unexpected answer \"%s\" to PING",
		    printable(answer, n));
		ping_why(p->err ? "cannot be reached" : p->eof || n > 0 ? why :
		    "no answer to PING in time");
	}
	peer_close(p);
	return 1;
}

static int
ping_step(struct clamd *c)
{
	struct target *t = c->target;
	struct peer *p = &ping.peer;
	const char *command = ping.version ? "zVERSION" : "zPING";

	if (p->fd == -1) {
		ping.until = ping.clamd_until;
		if (!ping.version)
			ping.addr = target_next(t, ping.addrs_tried);
		if (ping.addr == RESOLVING && now < ping.until)
			return 0;
		if (t->naddr == 0)
			ping_why(t->resolving ?
			    "the name is still being resolved" : no_address);
		if (ping.addr < 0) {
			ping_clamd(ping.which + 1);
			return 1;
		}
		ping.addrs_tried |= 1U << ping.addr;
		if (buf_ready(&p->out, strlen(command) + 1))
			buf_put(&p->out, command, strlen(command) + 1);
	}
	if (buf_len(&p->out) == 0)	/* the command has left */
		return ping_answer(c);
	switch (peer_connect(p, &t->addr[ping.addr], &ping.until,
	    (ping.clamd_until - now) / t->naddr)) {
	case 0:
		return 0;
	case -1:
		if (ping.version)
			ping_clamd(ping.which + 1);
		else
			ping_why(errno == ETIMEDOUT ?
			    "no answer to PING in time" : strerror(errno));
		return 1;
	}
	peer_drain(p, 0);		/* errors show when it is read */
	return ping_answer(c);
}

static void
ping_run(void)
{
	while (ping.which < ping.conf->nclamd)
		if (!ping_step(ping.conf->clamd[ping.which]))
			return;
	if (!ping.well && ping.report)
		logmsg(LOG_WARNING, "no clamd answers, and no message can be "
		    "scanned until one does: %s", ping.why);
	ping.conf = NULL;
	ping.ended = now;
}

static void
on_ping(void *arg, int revents)
{
	(void)arg;
	(void)revents;
	ping.peer.connecting = 0;
	ping_run();
}

static void
ping_poll(void)
{
	if (ping.conf != NULL && (ping.peer.fd == -1 || now >= ping.until))
		ping_run();
	if (ping.conf == NULL)
		return;
	if (ping.peer.fd != -1)
		poll_add(ping.peer.fd, ping.peer.connecting ? POLLOUT : POLLIN,
		    on_ping, NULL);
	poll_deadline(ping.until);
}

const char *
clamd_ping(const struct conf *c, int report)
{
	if (report || (ping.conf == NULL &&
	    (ping.ended == 0 || now - ping.ended >= SECOND))) {
		peer_close(&ping.peer);
		ping.conf = c;
		ping.report = report;
		ping.well = 0;
		ping_clamd(0);
		ping_run();
	}
	return ping.well ? "" : ping.conf != NULL ? NULL : ping.why;
}

void
clamd_poll(void)
{
	struct abandoned *a, **p = &abandoned;
	struct clamd *c;

	/* When the retry time of a clamd has come, run the queue. */
	for (c = clamds; c != NULL && queue != NULL; c = c->next) {
		poll_deadline(c->dead_until);
		if (now >= c->dead_until && c->dead_until != 0) {
			c->dead_until = 0;
			queue_run();
		}
	}
	while ((a = *p) != NULL) {
		if (now >= a->until) {
			*p = a->next;
			peer_close(&a->peer);
			a->at->abandoned--;
			slot_free(a->at);
			free(a);
			continue;
		}
		poll_add(a->peer.fd, POLLIN, on_abandoned, a);
		poll_deadline(a->until);
		p = &a->next;
	}
	ping_poll();
}
