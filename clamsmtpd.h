/*
 * clamsmtpd: an SMTP filter that has clamd scan each message.
 *
 * smtp.c tells the story of a session, clamsmtpd.c runs the sessions in a poll()
 * loop, clamd.c talks to clamd, conf.c reads the settings, and util.c has what
 * all of them use.  Calls run downwards in the order in which this file has the
 * prototypes, and no two files call each other.
 *
 * Promises.  A comment with the number marks the code that keeps each of them,
 * and a test fails when it is broken.
 *
 *  1	No mail is lost or invented: the client gets 2xx only after the next hop's
 *	2xx, or after a virus was handled as configured.
 *  2	The recipient gets what clamd judged, plus one header.
 *  3	One message in, at most one message out.
 *  4	No byte of a message leaves before clamd has called the message OK, unless
 *	the administrator wants that.
 *  5	Nothing stops the loop.
 *  6	Every buffer, queue and wait is bounded.
 *  7	Nothing is left behind.
 *  8	Text of a peer is data in each place that it reaches.
 *  9	Configuration files and log watchers of ClamSMTP work unchanged.
 * 10	The filter is no way around the next hop's own checks.
 *
 * Terms.
 *
 *  client	the program that has connected to us
 *  next hop	the mail server that gets the mail; `server' in names
 *  peer	a socket with its buffers: to the client, the next hop or clamd
 *  session	a connection of a client and all that belongs to it
 *  verb	the first word of a command
 *  outstanding	a command is, until its reply is complete
 *  relay	pass on unchanged
 *  refuse	answer a command with an error of our own
 *  envelope	the accepted sender and recipients of a message
 *  transaction	from MAIL to the reply to the message, or RSET
 *  message	the bytes of DATA or BDAT, without SMTP's framing
 *  end of data	CRLF.CRLF, or the last byte of BDAT LAST
 *  spool	the place of a message until its transaction ends
 *  scan line	a constant header line that only clamd gets, before the message
 *  scan	a message at a clamd
 *  slot	the right to one of the MaxScans scans of a clamd
 *  verdict	the result of a scan
 *  outcome	what becomes of a message; settled once, then logged
 *  reject	settle a complete message without forwarding it
 *  forward	send a message to the next hop
 *  replay	the message on its way to the next hop
 *  deadline	a time in monotonic milliseconds at which something gives up
 *  resolve	look up the addresses of a name
 *  target	an address of the configuration: path, IP address or name
 *  active	a session that ran a short time ago and does not wait for a
 *		slot; the others are idle
 *  drain	let the messages under way finish after SIGTERM
 *  reap	free what has ended: sessions, children
 */

#include <sys/types.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <netinet/in.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <syslog.h>		/* the LOG_ levels */
#include <string.h>
#include <strings.h>
#include <time.h>

#ifndef VERSION
#define VERSION		"2.0"
#endif
#ifndef CONFFILE
#define CONFFILE	"/etc/clamsmtpd.conf"
#endif

/* Sizes, in bytes. */
#define BUFSZ		32768		/* one buffer; one read or write */
#define BODYSZ		(4 * BUFSZ)	/* one read of a message's body */
#define LINESZ		12288		/* a command line (RFC 4954 4) */
#define REPLYSZ		16384		/* a reply of the next hop, all lines, */
#define RELAYSZ		(REPLYSZ / 4 * 5)	/* and with CRLF for each LF */
#define NOTESZ		1024		/* a reply of our own */
#define ADDRTEXT	128		/* an address as text */
#define NAMESZ		160		/* the name of a virus */
#define LOGSZ		1000		/* a line of the log */
#define JSONSZ		4000		/* a line of LogFormat: json */
#define JSONFIELD	500		/* a field of a message's JSON line */
#define RCPTSZ		65536		/* recipients for the VirusAction */

/* The most bytes that one system call moves; 1 in a test build. */
#ifndef IO_MAX
#define IO_MAX		(1 << 18)
#endif

/* The most bytes of a message in memory: its INSTREAM frame fits a buffer.  A
 * test build has less. */
#ifndef MEMSPOOL
#define MEMSPOOL	(BUFSZ - 64)
#endif
#define MAXMEMORY	(4 << 20)	/* of all messages in memory */

/* The longest message that clamd gets, in one chunk of INSTREAM, which has a
 * length of 32 bits like clamd's own limits.  A test build has less. */
#ifndef MAXSTREAM
#define MAXSTREAM	(UINT32_MAX - 64)
#endif

#define MAXADDRS	8		/* addresses of one name */
#define MAXLISTEN	32
#define MAXNETWORKS	32
#define MAXCLAMDS	32		/* one bit each in scan.tried */
#define MAXCOPIES	8		/* quarantine children at once */
#define MAXREFUSALS	20		/* commands refused in one session */
#define MAXACTIONS	8		/* VirusActions at once */
#define MAXWAITING	64		/* VirusActions that wait to run */

/* Times, in milliseconds, that no setting changes. */
#define SECOND		((int64_t)1000)
#define FINAL_TIME	(600 * SECOND)	/* RFC 5321 4.5.3.2.6 */
#define LINGER_TIME	(5 * SECOND)
#define STOP_LINGER_TIME SECOND		/* the same while the daemon stops */
#define HALF_CLOSE_TIME	(5 * SECOND)	/* EOF so soon after the end of data */
#define CONNECT_TIME	(5 * SECOND)	/* to clamd */
#define PROXY_TIME	(5 * SECOND)	/* for a PROXY header */
#define PING_TIME	(5 * SECOND)	/* for clamd's PONG */
#define DRAIN_TIME	(8 * SECOND)	/* after SIGTERM */
#define BEGIN_TIME	SECOND		/* after SIGTERM, to begin a mail */
#define LOOKUP_TIME	(60 * SECOND)	/* before a name is resolved again */
#define RETRY_TIME	(30 * SECOND)	/* before a dead clamd is tried again */
#define ABANDON_LIMIT	(600 * SECOND)	/* an abandoned scan has its slot */
#define REPEAT_TIME	(60 * SECOND)	/* between two equal complaints */
#define CONNECT_RETRY	100		/* when the backlog of clamd is full */
#define SLOWEST_BODY	100		/* bytes a second, over TimeOut */

/* Bytes b[r] .. b[w-1] wait, 0 <= r <= w <= size.  b may be NULL if there are
 * none.  While a session runs, b of one peer's `in' may be the buffer that all
 * peers share (peer_fill(), peer_settle()). */
struct buf {
	char	*b;
	unsigned r, w, size;
};

/* A text that grows.  A NUL follows it; s is NULL until something is added. */
struct str {
	char	*s;
	unsigned len, size;
};

/*
 * A socket and its buffers; fd is -1 when there is none.  eof: nothing more can
 * be read.  err: output is discarded.  It is 1 after an error of the connection
 * and PEER_LOCAL after one of our own (no memory, the spool cannot be read).
 */
#define PEER_LOCAL	2

struct peer {
	int	 fd;
	int	 eof, err;
	int	 connecting;		/* until poll() reports the result */
	struct buf in, out;
};

struct addr {
	socklen_t len;			/* 0: no address */
	union {
		struct sockaddr	sa;
		struct sockaddr_in in;
		struct sockaddr_in6 in6;
		struct sockaddr_un un;
	} u;
};

/*
 * An address of the configuration.  A numeric address or a path is in addr[0]
 * from the start.  For a name addr has the result of the last look-up.  Without
 * a ClamAddress addr has the usual paths.  A target with neither name nor
 * address is a port at the client's own address.
 */
struct target {
	int	 refs;
	char	*text;			/* as written, for messages */
	char	*name;			/* NULL: nothing to look up */
	unsigned port;
	int	 naddr;
	struct addr addr[MAXADDRS];
	int	 first;			/* index of the one that worked last */
	int	 resolving;		/* a child looks the name up */
	int64_t	 resolved_at;	/* when it began last; 0: never */
};

/* A ClamAddress and its health, which a reload does not reset. */
struct clamd {
	int	 refs;
	struct target *target;
	int	 running;		/* scans, with the abandoned ones */
	int	 abandoned;		/* abandoned scans */
	int64_t	 dead_until;		/* 0: alive, as far as is known */
	int	 on_trial;		/* it timed out: one scan at a time */
	unsigned long long failures;
	int64_t	 signatures;		/* version of them; 0: not known, */
	int64_t	 signatures_at;		/* and their time(2), if known */
	char	 complaint[NOTESZ / 4];	/* logged last; empty: it works */
	int64_t	 quiet_until;		/* complaint is not repeated before */
	struct clamd *next;
};

enum action { DROP, BOUNCE, PASS };

struct rule {				/* a pattern of an Action line */
	struct rule *next;
	enum action action;
	char	 pattern[];		/* as of fnmatch(3), for virus names */
};

struct network {			/* of ProxyFrom */
	struct addr addr;		/* family AF_UNIX: all unix sockets */
	int	 bits;
};

/* The settings.  A session has a reference to those that it began with. */
struct conf {
	int	 refs;
	char	*path;			/* of the file, from the root */
	enum action action;		/* if no rule matches */
	struct rule *rules;
	int	 nclamd;
	struct clamd *clamd[MAXCLAMDS];
	int	 debug_files;
	char	*header;		/* NULL: none */
	int64_t	 keepalives;		/* ms; 0: none */
	int	 nlisten;
	/* nlisten of them, status unless that is NULL, and NULL. */
	struct target *listen[MAXLISTEN + 2];
	int	 json;			/* LogFormat */
	int64_t	 maxconn;
	int64_t	 maxscans;
	int64_t	 maxscansize;		/* bytes; 0: none */
	struct target *out;
	char	*pidfile;
	int	 nproxies;
	struct network proxies[MAXNETWORKS];
	int	 quarantine;
	int	 failopen;		/* ScanFailure: pass */
	int64_t	 scantimeout;		/* ms */
	struct target *status;		/* StatusListen; NULL: none */
	char	*tempdir;
	int64_t	 timeout;		/* ms */
	int	 transparent;
	char	*user;
	char	*virusaction;
	int	 xclient;
	unsigned long long waiting;	/* sessions in the scan queue (clamd.c) */
	/* conf.c's, while it reads the settings. */
	unsigned char source;		/* of the setting that is being read */
	unsigned char seen[40];		/* the last source of each keyword, */
	unsigned char action_seen;	/* and of the action of all viruses */
	int	 line, errors;
};

/* FAILED: clamd gave no verdict, or none that counts. */
enum verdict { UNKNOWN, CLEAN, VIRUS, FAILED, TOOBIG };

/* In the order of the session; smtp.c has the table. */
enum state {
	S_PROXY, S_CONNECT, S_GREETING, S_COMMAND, S_REPLY, S_AUTH, S_BODY,
	S_CHUNK, S_SCAN, S_QUARANTINE, S_DATA, S_REPLAY, S_FINAL, S_RESET, S_LINGER,
	S_DEAD
};

/* Positions of the body filter between two bytes (smtp.c). */
enum eol { BOL, BOL_DOT, BOL_DOT_CR, LINE, TEXT, CRS };

/* Positions of the search for the end of the header section (smtp.c). */
enum header {
	H_FIRST, H_FROM, H_MBOX, H_LINE, H_NAME, H_BLANK, H_REST, H_DONE
};

struct verb;

/* XCLIENT on this connection to the server. */
enum xclient {
	XC_DONE,			/* not wanted, sent, or not possible */
	XC_WANTED,			/* due before any mail */
	XC_EHLO				/* refused after HELO: again after EHLO */
};

/* The connection to the next hop: from the first connect() to its close. */
struct server {
	struct peer peer;
	struct addr addr;		/* of the next hop */
	struct addr local;		/* our end; len 0: not connected */
	int	 addr_index;		/* of addr in conf->out */
	unsigned addrs_tried;		/* bit i: conf->out->addr[i] has failed */

	/* At most one command is outstanding.  After a 334 that is still AUTH,
	 * and after a 354 DATA: the next hop takes no other command. */
	const struct verb *verb;	/* NULL: none */
	struct str argument;		/* its address, or XFORWARD's line */
	int64_t	 noop_at;		/* when to send a NOOP; 0: never */
	size_t	 reply_seen;		/* bytes of complete lines in peer.in */
	const char *why;		/* the connection was given up */
	struct str farewell;		/* the 4xx reply before that, if any */

	/* The last EHLO reply. */
	int64_t	 size;			/* bytes; 0: no limit */
	int	 chunking;
	int	 xclient;		/* attributes: X_ bits (smtp.c) */
	struct str ehlo;		/* as the client gets it, after XCLIENT */
};

/* Accepted sender and recipients: from MAIL to the end of the transaction. */
struct envelope {
	int	 have_mail;		/* MAIL was accepted */
	int	 nrcpt;			/* RCPT commands that were accepted */
	struct str from;		/* bare address, or <> */
	struct str rcpt_list;		/* bare addresses, one per line */
	int	 rcpt_truncated;	/* rcpt_list ends in "..." */
};

/* What the next hop accepted with XFORWARD; empty: not known. */
struct xforward {
	struct str addr, helo;
};

/* The bytes of a message: in memory if they are few, else in a file. */
struct spool {
	const char *dir;		/* for the file */
	char	*mem;			/* NULL: not in memory */
	int	 fd;			/* -1: not in a file */
	off_t	 size;
};

/*
 * A message: from DATA or the first BDAT to the end of the transaction.  The
 * spool contains scan_line and then `size' bytes.
 */
struct message {
	struct spool spool;
	off_t	 size;			/* bytes of the message */
	int	 in_bdat;		/* it comes by BDAT */
	int	 relay_bdat;		/* and goes out by BDAT, unchanged */
	uint64_t chunk_left;		/* bytes of this chunk that are to come */
	int	 chunk_last;		/* BDAT LAST */
	enum eol body_state;
	uint64_t held_bytes;		/* CRs or NULs that may have to go */
	int	 has_dot_lines;		/* dots are to be stuffed */
	enum header header_state;
	off_t	 top;			/* end of the mbox lines at the top */
	off_t	 header_end;		/* end of the header section */
	int	 matched;		/* H_FROM: bytes of "From " */
	int	 indented;		/* the line at top begins with a blank */
	int64_t	 rate_check_at;		/* when the rate is checked, */
	uint64_t rate_bytes;		/* and bytes since the last check */
	int64_t	 dot_at;		/* when the end of data came */
};

/* The scan of a message: from clamd_begin() to the verdict.  The session polls
 * it, so smtp.c knows phase, peer and deadline. */
struct scan {
	/* queue_run() ends SC_QUEUE when a clamd has a free slot. */
	enum { SC_NONE, SC_QUEUE, SC_CONNECT, SC_SEND, SC_ANSWER } phase;
	struct peer peer;
	struct clamd *clamd;		/* the scan has a slot of it; or NULL */
	int	 addr;			/* index of its address */
	unsigned addrs_tried;		/* bit i: that address has failed */
	uint32_t tried;			/* bit i: conf->clamd[i] has failed */
	int64_t	 deadline;		/* of the connection, or without a */
					/* socket when to try again; 0: none */
	off_t	 sent;			/* bytes of the spool */
	int	 queued;		/* the end is in peer.out */
	int	 scanning;		/* clamd has the whole message */
	struct session *next;		/* in the queue */
};

/* What becomes of a message: for the client, the log and the counters. */
enum outcome {
	OUT_CLEAN, OUT_VIRUS, OUT_CLAMD_ERROR, OUT_UNSCANNED, OUT_OVERSIZE,
	OUT_ERROR, NOUTCOMES,
	OUT_NONE = -1			/* not known yet */
};

struct result {
	enum outcome outcome;		/* set once, in smtp.c's settle_text() */
	struct str reply;		/* what the client gets then */
	enum verdict verdict;
	char	 text[NAMESZ];		/* the virus, or why the scan FAILED */
	int64_t	 verdict_at;		/* 0: there was none */
	enum action action;		/* of a VIRUS */
	struct child *child;		/* makes the quarantine copy */
	int	 copying;		/* child was started */
	struct str quarantined;		/* path of the copy */
};

/* The message on its way to the next hop: from forward() to the final reply. */
struct replay {
	struct str header;		/* ours, with CRLF */
	off_t	 header_off;		/* where it goes in */
	int	 header_queued;
	off_t	 off;			/* bytes of the message that are queued */
	int	 at_bol;		/* the next byte begins a line */
	int	 dot_queued;		/* the end of data is queued */
	int64_t	 reply_deadline;	/* for the final reply */
};

struct session {
	unsigned id;			/* first word of its log lines */
	enum state state;		/* assigned in enter() only */
	int64_t	 deadline;		/* of this state; monotonic ms */
	struct conf *conf;		/* a reference */

	int	 index;			/* in the session table (smtp.c) */
	int	 runnable;		/* it is in the list of runnable sessions */
	struct session *next_runnable;
	int64_t	 ran_at;
	int64_t	 next_time;		/* the earliest deadline at the last poll */
	int	 io_budget;		/* pieces it may still send in this run */

	struct peer client;
	struct addr peer_addr;		/* the other end of client, */
	struct addr client_addr;	/* and the client that PROXY names */
	struct addr local_addr;		/* our end of client */
	int64_t	 eof_at;		/* when client.eof was set */
	int	 skipping;		/* the rest of an overlong line */
	int	 refusals;		/* commands that we have refused */
	int	 rejected;		/* by a 5xx greeting: 503 until QUIT */
	int	 shut;			/* LINGER: the last reply has left */
	struct str helo;		/* the last HELO or EHLO line */
	enum xclient xclient_state;
	struct xforward xforward;

	struct server server;
	struct envelope env;
	struct message msg;
	struct scan scan;
	struct result result;
	struct replay replay;
};

struct child;				/* a child process (util.c) */

extern const char outcome_names[NOUTCOMES][12];	/* (smtp.c) */

#define NBUCKETS 9

struct counters {			/* since the start */
	unsigned long long started;		/* time(2) */
	unsigned long long open, most_open;	/* sessions: now, and at most */
	unsigned long long scans_running, scans_waiting;	/* now */
	unsigned long long sessions, refused, bytes;
	unsigned long long all_messages, messages[NOUTCOMES];
	unsigned long long scans[NBUCKETS];	/* took so long (scan_limits) */
	unsigned long long scan_ms;		/* all together */
	unsigned long long log_lost;		/* lines of the log */
};
extern struct counters count;			/* (util.c) */
extern const int scan_limits[NBUCKETS - 1];	/* ms (clamd.c) */

/* smtp.c */

/* Begin a session with the client at the other end of fd, or send it a 421 if
 * MaxConnections are open or memory is short.  Takes fd. */
void session_accept(int fd, const struct addr *, struct conf *);

/* Add sessions to the poll set: all of them, or only those that ran lately.
 * in_vain: the last poll() returned nothing. */
void sessions_poll(int in_vain);

/* Run each session that was woken or whose next_time has come; if run_all is
 * set, run them all. */
void sessions_run(void);

/* For SIGTERM: a session without a message that did nothing for idle_time ms
 * sends 421 and ends; at_once: every session. */
void sessions_shutdown(int64_t idle_time, int at_once);

/* Free the sessions that have ended. */
void sessions_reap(void);

/* conf.c */

/*
 * Read the settings from the old flags, which are (name, value) pairs, then
 * from the file, then from the environment, then from pidfile unless that is
 * NULL.  Logs all errors.  Returns NULL if there was one.
 */
struct conf *conf_load(const char *path, const char *const (*flags)[2], int nflags,
    const char *pidfile);
void conf_show(const struct conf *);		/* to standard output */
void conf_put(struct conf *);			/* drop a reference */
enum action conf_action(const struct conf *, const char *virus);

/* clamd.c */

/* Returns the clamd with this address, known already or new, with a reference,
 * or NULL without memory.  Takes the target in either case. */
struct clamd *clamd_get(struct target *);
void clamd_put(struct clamd *);
void clamd_begin(struct session *);		/* queue a complete message */
int clamd_scan(struct session *);		/* 1: there is a verdict; 0: wait */
void clamd_timeout(struct session *);		/* at ScanTimeOut: no verdict */
void clamd_cancel(struct session *);		/* abandon the scan, if any */
void clamd_poll(void);				/* abandoned scans, checks */
/*
 * Find out by PING whether a clamd answers, and with a status page by VERSION
 * which signatures each has (clamd(8)).  Returns an empty text when one has
 * answered, the reason when none has, or NULL while the check is under way.  A
 * result is used for a second.  report: the settings are new, so a new check
 * begins, and a warning is logged when no clamd answers.  c must stay valid
 * until the next call with report set.
 */
const char *clamd_ping(const struct conf *c, int report);

/* util.c */

/*
 * As snprintf(3) and vsnprintf(3), but they return the number of bytes written
 * and do not cut a UTF-8 character in two.  They know %s, %.*s, %c, %d, %u, %x
 * and %X, the lengths l and ll, and a width with zeros such as %06X.  libc's
 * printf with its floating point would be a tenth of the static program.
 */
size_t format(char *, size_t, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
size_t vformat(char *, size_t, const char *fmt, va_list);

/* The log.  After a format that ends in a colon errno's text is appended.
 * slog() preserves errno; the session may be NULL. */
extern int log_level;		/* lines up to this LOG_ level are written */
extern int log_json;		/* LogFormat: json */
extern int log_echo;		/* errors and warnings go to stderr as well */
extern int log_held;		/* keep messages while there is room */
extern int log_wait;		/* ms to wait for a slow reader, 0 in the loop */
void log_open(int level, int console);		/* syslog, or stderr */
void slog(const struct session *, int level, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
#define logmsg(...)	slog(NULL, __VA_ARGS__)
/* Write the messages that were kept since log_held was set, and all later ones,
 * as text or JSON. */
void log_format(int json);

/* Log a line of JSON about a message: json_begin(), fields, json_end().  A long
 * text is cut and ends in "...".  json_lines() writes the lines of p as a list,
 * and "..." in place of those for which there is no room. */
void json_begin(const struct session *, int level);
void json_text(const char *name, const char *p, size_t n);
void json_number(const char *name, long long);
void json_lines(const char *name, const char *p);
void json_end(int level);

/* Returns the name of the effective user, or the number.  The first call, after
 * the last change of the user and before the loop, reads passwd(5). */
const char *user_name(void);

/* Read the decimal digits at p; a NUL or a character of ends must follow them.
 * Returns 1 and the number in *n, 0 and INT64_MAX when the number is too large,
 * or -1 when there is no such number. */
int parse_number(const char *p, const char *ends, int64_t *n);

/* Promise 8: replace each of n bytes that is neither visible ASCII nor one of
 * blanks with mark. */
void ascii_clean(char *p, size_t n, const char *blanks, char mark);

/* Returns 1 when the n bytes at p are text.  word_equal() ignores case. */
static inline int
mem_equal(const char *p, size_t n, const char *text)
{
	return n == strlen(text) && memcmp(p, text, n) == 0;
}

static inline int
word_equal(const char *p, size_t n, const char *word)
{
	return n == strlen(word) && strncasecmp(p, word, n) == 0;
}

/* Returns 1 when c may be in the name of a header field (RFC 5322 2.2). */
static inline int
is_name_char(char c)
{
	return c > ' ' && c < 127 && c != ':';
}

/* Returns the length of the character in the n bytes at p, 1 to 4, or 0 when
 * they begin with a control character (C0, DEL, C1) or no UTF-8. */
size_t text_char(const char *p, size_t n);

/* Returns n bytes as text for the log, in one of a few static buffers that are
 * used in turn.  Each byte of control characters, of invalid UTF-8 and below
 * lowest becomes \xHH.  A long text is cut and ends in "...". */
const char *escape(const char *, size_t n, int lowest);
#define printable(p, n)		escape(p, n, ' ')
#define printable_word(p, n)	escape(p, n, ' ' + 1)	/* and a blank \x20 */
const char *rfc3339_date(time_t);		/* in a static buffer */

static inline size_t
buf_len(const struct buf *p)
{
	return p->w - p->r;
}

char *buf_head(const struct buf *);		/* the first byte that waits */
int buf_ready(struct buf *, size_t n);		/* 1: n more bytes fit */
void buf_put(struct buf *, const void *, size_t n);	/* after buf_ready() */
void buf_eat(struct buf *, size_t n);
void buf_free(struct buf *);

int str_add(struct str *, const char *, size_t n);	/* -1: no memory */
int str_set(struct str *, const char *, size_t n);
void str_free(struct str *);

/* Read once, up to BUFSZ bytes, or BODYSZ if body is set.  Returns 1 after
 * bytes, EOF or an error, 0 when there was nothing. */
int peer_fill(struct peer *, int body);
/* Copy unread input out of the shared buffer, after the session has run.
 * Returns 0, or -1 without memory: the input is lost. */
int peer_settle(struct peer *);
/* Write `out'.  Returns 1 when it is empty, 0 when the socket is full.  more:
 * the bytes that follow may share a segment (MSG_MORE). */
int peer_drain(struct peer *, int more);
/* Send up to n bytes of file fd from *at, and advance *at.  Returns 1, or 0
 * when the socket is full. */
int peer_sendfile(struct peer *, int fd, off_t *at, off_t n);
void peer_close(struct peer *);
/* Returns 1 when the connection has failed, as far as the kernel knows now. */
int peer_reset(struct peer *);
/* Returns 1 when the kernel has bytes that were not read, -1 at EOF or after an
 * error, or 0.  Reads nothing and needs no memory. */
int peer_peek(const struct peer *);

/* Returns a text such as a.b.c.d, v6, path or "local" in one of a few static
 * buffers that are used in turn. */
const char *addr_format(const struct addr *, int with_port);
#define addr_text(a)	addr_format(a, 0)
#define addr_full(a)	addr_format(a, 1)
int addr_equal(const struct addr *, const struct addr *);
/* Returns 1 when the address is in the network of so many bits, else 0.  All
 * unix sockets are one network. */
int addr_in(const struct addr *, const struct addr *net, int bits);
void addr_unmap(struct addr *);			/* make ::ffff:a.b.c.d an IPv4 address */

/* The port of an IPv6 address is where that of an IPv4 address is. */
static inline unsigned
addr_port(const struct addr *a)
{
	return a->u.sa.sa_family == AF_UNIX ? 0 : ntohs(a->u.in.sin_port);
}

static inline void
addr_set_port(struct addr *a, unsigned port)
{
	a->u.in.sin_port = htons(port);
}

int addr_ip(struct addr *, const char *text, unsigned port);	/* -1: not numeric */
int addr_path(struct addr *, const char *path);	/* -1: too long */
/* Look name up, which blocks.  Returns the number of addresses in addr. */
int addr_lookup(const char *name, unsigned port, struct addr addr[MAXADDRS]);
/*
 * Returns the index of the address to try next, RESOLVING while there is none
 * yet, or NO_ADDR.  The one that worked last comes first, then those that
 * follow it.  Those whose bit is set in tried are skipped, and paths that do not
 * exist.  If no path exists, returns the first, for the error of its connect().
 */
enum { NO_ADDR = -1, RESOLVING = -2 };
int target_next(struct target *, unsigned tried);
/* Returns the name of a target for messages: its text, or of several paths the
 * one that is in use, if there is one. */
const char *target_text(struct target *);
/* Record that this address works, so that it is tried first from now on, and
 * log a change.  The target may not have the address any more. */
void target_worked(struct target *, const struct addr *);
void target_put(struct target *);		/* drop a reference; may be NULL */
/* Look the target's name up in a child unless that was done in the last minute;
 * force: in the last 5 s, for a target whose address was of no use.  Returns at
 * once; all sessions run when there is a result. */
void target_resolve(struct target *, int force);
/* Connect p to this address.  The first call begins and sets *deadline to ms
 * from now; later calls go on.  Returns 1 when p is connected, 0 when not yet,
 * or -1 and errno when the attempt has failed (ETIMEDOUT: at the deadline). */
int peer_connect(struct peer *, const struct addr *, int64_t *deadline, int64_t ms);

/*
 * The poll set.  poll_add(): call ready (unless it is NULL) if one of events or
 * an error comes.  poll_deadline(): sleep until t at most; 0 is no time.
 * poll_wait(): sleep, set now, call the ready functions in the order in which
 * they were added, and empty the set.  Returns what poll() did.
 */
extern int64_t now;			/* CLOCK_MONOTONIC, ms; one time per pass */
void poll_add(int fd, int events, void (*ready)(void *arg, int revents), void *arg);
void poll_deadline(int64_t t);
int poll_wait(void);

/* Sessions that sessions_run() is to run.  poll_wait() does not sleep while
 * there are any.  session_rest() removes one from the list. */
extern struct session *runnable;
extern int run_all;			/* run every session */
void session_wake(struct session *);
void session_rest(struct session *);

/* The child's caller is gone: it gets no answer. */
void child_forget(struct child *);

/* Run the shell command for at most ms, after those that wait already.  env has
 * variables for it: name, NUL, value, NUL, and after the last one more NUL.  A
 * variable without a value is unset.  Takes env, which is freed with free(). */
void virusaction_start(unsigned id, const char *command, char *env, int64_t ms);
extern int virusactions;	/* how many run or wait */

void children_reap(void);	/* after SIGCHLD */
void children_kill(void);	/* the daemon ends: kill and reap them all */
/* At the start: keep nothing of the program that started us, neither its signal
 * mask and ignored signals, nor its descriptors above 2, which may hold a lock,
 * but the first nkept.  Open descriptors 0 to 2 if need be, so that no socket
 * becomes one of them.  Set now. */
void process_begin(int nkept);

extern const char scan_line[];			/* precedes the message */
extern const size_t scan_line_len;
/* Open a file in dir, without a name, or with one if keep is set (DebugFiles).
 * Returns a descriptor, or -1 with errno set. */
int spool_file(const char *dir, int keep);
/* Open a spool.  A message of up to MEMSPOOL bytes stays in memory, unless keep
 * is set or the messages in memory would have more than MAXMEMORY bytes.  dir
 * must last as long as the spool.  Returns 0, or -1 with errno set. */
int spool_open(struct spool *, const char *dir, int keep);
/* Append n pieces, which spool_write() may modify.  Returns 0, or -1 with errno
 * set; the spool is of no more use then. */
int spool_write(struct spool *, struct iovec *, int n);
/* Returns the number of bytes read at offset `at', 0 at the end, or -1 with
 * errno set. */
ssize_t spool_read(const struct spool *, void *, size_t n, off_t at);
void spool_close(struct spool *);
/*
 * Start a child that copies the message to dir.  When it has ended, done(ctx,
 * answer, n) is called with the path of the copy, which begins with a slash, or
 * the reason of a failure, or nothing.  Returns NULL and errno when the child
 * cannot be started: EBUSY when MAXCOPIES run.  All sessions run when one ends.
 */
struct child *spool_quarantine(const struct spool *, const char *dir,
    void (*done)(void *, const char *, size_t), void *ctx, int64_t ms);
