/*
 * The settings.  One table describes all `Name: value' lines.  The defaults are
 * such lines, too.
 */

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <unistd.h>

#include "clamsmtpd.h"

#define MAXFILE		(1 << 20)	/* bytes of a configuration file */
#define MAXCONFLINE	4096

/* The kind of a value.  The kinds of words are first: they are the indices of
 * three tables. */
enum kind {
	K_ON_OFF, K_FAILURE, K_FORMAT,		/* a word, stored as an int */
	K_COUNT, K_SECONDS, K_SIZE,		/* int64_t; K_SECONDS: in ms */
	K_TEXT, K_PATH, K_HEADER,		/* char *; NULL: none */
	K_TARGET,				/* struct target *; or NULL */
	K_ACTION, K_LISTEN, K_CLAMD, K_NETWORKS	/* lists, may be repeated */
};

/* Arrays, since pointers would need relocations. */
struct keyword {
	char	 name[17];
	unsigned char kind;
	unsigned short off;		/* of the field; lists do not need it */
	char	 now_called[7];		/* of an old name: the new one */
	int	 min, max;		/* of a number; min: or of a port */
	char	 host[10];		/* of an address that is a port alone, */
	unsigned short port;		/* and of one without a port */
};

/*
 * Promise 9: the defaults of the original.  Of the paths of ClamAddress the first
 * that exists is used: upstream's and Alpine's, Debian's, or the original's.
 */
static const char defaults[] =
	"Listen: 10025\n"
	"ClamAddress: /run/clamav/clamd.sock, /var/run/clamav/clamd.ctl, "
	    "/var/run/clamav/clamd\n"
	"Header: X-Virus-Scanned: ClamAV using ClamSMTP\n"
	"MaxScans: 10\n"
	"MaxConnections: 64\n"
	"TimeOut: 180\n"
	"TempDirectory: /tmp\n";

#define OFF(field)	.off = offsetof(struct conf, field)

/* Promise 9: all settings of the original. */
static const struct keyword keywords[] = {
	{ "OutAddress", K_TARGET, OFF(out), .min = 1, .port = 25 },
	{ "Listen", K_LISTEN, .host = "0.0.0.0", .port = 10025 },
	{ "ClamAddress", K_CLAMD, .min = 1, .host = "127.0.0.1", .port = 3310 },
	{ "Action", K_ACTION, OFF(action) },
	{ "Header", K_HEADER, OFF(header) },
	{ "Quarantine", K_ON_OFF, OFF(quarantine) },
	{ "VirusAction", K_TEXT, OFF(virusaction) },
	{ "ScanFailure", K_FAILURE, OFF(failopen) },
	{ "ScanTimeOut", K_SECONDS, OFF(scantimeout), .min = 1, .max = 86400 },
	{ "MaxScans", K_COUNT, OFF(maxscans), .min = 1, .max = 1000 },
	{ "MaxScanSize", K_SIZE, OFF(maxscansize) },
	{ "MaxConnections", K_COUNT, OFF(maxconn), .min = 2, .max = 65535 },
	{ "TimeOut", K_SECONDS, OFF(timeout), .min = 1, .max = 86400 },
	{ "KeepAlives", K_SECONDS, OFF(keepalives), .max = 86400 },
	{ "XClient", K_ON_OFF, OFF(xclient) },
	{ "TransparentProxy", K_ON_OFF, OFF(transparent) },
	{ "TempDirectory", K_PATH, OFF(tempdir) },
	{ "PidFile", K_PATH, OFF(pidfile) },
	{ "User", K_TEXT, OFF(user) },
	{ "ProxyFrom", K_NETWORKS, OFF(proxies) },
	{ "StatusListen", K_TARGET, OFF(status), .min = 1,
	  .host = "127.0.0.1", .port = 10080 },
	{ "LogFormat", K_FORMAT, OFF(json) },
	{ "DebugFiles", K_ON_OFF, OFF(debug_files) },
	{ "ScanHeader", K_HEADER, OFF(header), .now_called = "Header" },
	/* Off is DROP, and on is BOUNCE. */
	{ "Bounce", K_ON_OFF, OFF(action), .now_called = "Action" },
};
#define NKEYWORDS	(sizeof keywords / sizeof keywords[0])

/* The source of a setting.  A later one overrides an earlier one. */
enum source { BY_DEFAULT, BY_FLAG, BY_FILE, BY_ENVIRONMENT };

static void *
field(const struct conf *c, const struct keyword *k)
{
	return (char *)(uintptr_t)c + k->off;
}

/*
 * Setters.  Each returns NULL, or the end of the message `"value" is not ...'.
 * The value has no blanks around it, and is not empty unless it is a header.
 */

static const char no_memory[] = "kept: out of memory";
static const char too_many[] = "allowed: 32 is the maximum";
static const char blanks[] = " \t";

/* Returns the first word of *text, advances *text past it, and sets *n to its
 * length, which is 0 at the end. */
static const char *
next_word(const char **text, size_t *n)
{
	const char *word = *text + strspn(*text, blanks);

	*n = strcspn(word, blanks);
	*text = word + *n;
	return word;
}

/* Returns the index of the n bytes at v in a list of words, or -1. */
static int
find_word(const char *words, const char *v, size_t n)
{
	const char *word;
	size_t len;
	int i;

	for (i = 0; word = next_word(&words, &len), len > 0; i++)
		if (len == n && strncasecmp(word, v, n) == 0)
			return i;
	return -1;
}

static const char *
set_word(int *to, const struct keyword *k, const char *v)
{
	static const char wanted[][17] = {
		"on or off", "tempfail or pass", "classic or json"
	};
	/* They stand for 0 and 1 in turn. */
	static const char words[][29] = {
		"off on no yes false true 0 1", "tempfail pass", "classic json"
	};
	int i = find_word(words[k->kind], v, strlen(v));

	if (i == -1)
		return wanted[k->kind];
	*to = i & 1;
	return NULL;
}

static const char *
set_number(int64_t *to, const struct keyword *k, const char *v)
{
	static char range[96];

	format(range, sizeof range, "a number from %d to %d", k->min, k->max);
	if (parse_number(v, "", to) != 1 || *to < k->min || *to > k->max)
		return range;
	if (k->kind == K_SECONDS)
		*to *= SECOND;
	return NULL;
}

static const char *
set_size(int64_t *to, const char *v)
{
	static const char suffixes[] = "KkMmGg";
	const char *end = v + strspn(v, "0123456789"), *suffix;
	int shift = 0;

	suffix = *end != '\0' ? strchr(suffixes, *end) : NULL;
	if (suffix != NULL && end[1] == '\0')
		shift = 10 + (suffix - suffixes) / 2 * 10;
	if (parse_number(v, shift > 0 ? suffixes : "", to) != 1 ||
	    *to > INT64_MAX >> shift)
		return "a number of bytes, such as 25M, or 0 for no limit";
	*to <<= shift;
	return NULL;
}

static const char *
set_text(char **to, const char *v)
{
	*to = strdup(v);
	return *to == NULL ? no_memory : NULL;
}

/* Set a path from the root.  A relative one means the directory of the start,
 * also at a reload. */
static const char *
set_path(char **to, const char *v)
{
	static char start[PATH_MAX];
	char path[2 * PATH_MAX];
	int rooted = *v == '/';
	size_t n;

	if (start[0] == '\0' && getcwd(start, sizeof start) == NULL && !rooted)
		return "usable: the current directory is gone";
	if (strlen(v) >= PATH_MAX)
		return "a path of this system: it is too long";
	n = format(path, sizeof path, "%s%s%s", rooted ? "" : start,
	    rooted ? "" : "/", v);
	while (n > 1 && path[n - 1] == '/')
		path[--n] = '\0';
	return set_text(to, path);
}

/*
 * Action.
 */

/* The value is an action and patterns of virus names.  Without a pattern the
 * action is for all viruses. */
static const char *
set_action(struct conf *c, const char *v)
{
	struct rule *r, **last = &c->rules;
	const char *word;
	size_t n;
	int i;

	word = next_word(&v, &n);
	if ((i = find_word("drop bounce pass reject", word, n)) == -1)
		return "bounce, drop or pass (with patterns of virus names, "
		    "if only for those)";
	if (i > PASS)
		i = BOUNCE;
	if (*v == '\0')
		c->action = i;
	while (*last != NULL)
		last = &(*last)->next;
	while (word = next_word(&v, &n), n > 0) {
		if ((r = calloc(1, sizeof *r + n + 1)) == NULL)
			return no_memory;
		memcpy(r->pattern, word, n);
		r->action = i;
		*last = r;
		last = &r->next;
	}
	return NULL;
}

/* Match c against the element at *p of a pattern, which is no star, and advance
 * *p.  A '[' without ']' is an ordinary character. */
static int
matches_one(const char **p, char c)
{
	const char *q = *p, *set;
	int not, found = 0;

	if (*q == '[') {
		not = q[1] == '!' || q[1] == '^';
		set = q + 1 + not;
		for (q = set; *q != '\0' && (*q != ']' || q == set); q++)
			if (q[1] == '-' && q[2] != ']' && q[2] != '\0') {
				found |= q[0] <= c && c <= q[2];
				q += 2;
			} else
				found |= *q == c;
		if (*q == ']') {
			*p = q + 1;
			return found != not;
		}
		q = *p;
	} else if (*q == '?') {
		*p = q + 1;
		return 1;
	} else if (*q == '\\' && q[1] != '\0')
		q++;
	*p = q + 1;
	return *q == c;
}

/* As fnmatch(3) without flags, which would add 17 KB to the static binary. */
static int
matches(const char *p, const char *s)
{
	const char *star = NULL, *back = s, *next;

	for (;;) {
		if (*p == '*') {
			star = ++p;
			back = s;
			continue;
		}
		if (*s == '\0' && *p == '\0')
			return 1;
		next = p;
		if (*s != '\0' && matches_one(&next, *s)) {
			p = next;
			s++;
		} else if (star != NULL && *back != '\0') {
			p = star;	/* the star matches one more */
			s = ++back;
		} else
			return 0;
	}
}

enum action
conf_action(const struct conf *c, const char *virus)
{
	const struct rule *r;

	for (r = c->rules; r != NULL; r = r->next)
		if (matches(r->pattern, virus))
			return r->action;
	return c->action;
}

/*
 * Header.  The setter replaces \r, \n and \t; smtp.c replaces % sequences.
 * Lines end in CRLF, except the last one.
 */

/* Returns 1 when each line has a name or continues the one before, else 0. */
static int
is_header(const char *h)
{
	const char *p, *q;

	for (p = h; p != NULL; p = strchr(q, '\n')) {
		p += p != h;
		q = p + strspn(p, blanks);
		if (q != p && p != h && *q != '\r')
			continue;
		for (q = p; is_name_char(*q); q++)
			;
		if (q == p || *q != ':')
			return 0;
	}
	return 1;
}

#define EXPANDED	64		/* bytes that a % sequence counts as */

static const char *
set_header(char **to, const char *v)
{
	char *h = malloc(2 * strlen(v) + 1), *w = h;
	size_t room = BUFSZ / 4;
	const char *wrong = NULL;

	if (h == NULL)
		return no_memory;
	for (; *v != '\0' && room > EXPANDED; v++) {
		room -= *v == '%' ? EXPANDED : 1;
		if (strncmp(v, "\\r\\n", 4) == 0)
			v += 2;
		if (v[0] == '\\' && v[1] == 't') {
			*w++ = '\t';
			v++;
		} else if (v[0] == '\\' && (v[1] == 'n' || v[1] == 'r')) {
			*w++ = '\r';
			*w++ = '\n';
			v++;
		} else
			*w++ = *v;
	}
	while (w > h && strchr(" \t\r\n", w[-1]) != NULL)
		w--;
	*w = '\0';
	if (*v != '\0')
		wrong = "short enough for a header";
	else if (*h != '\0' && !is_header(h))
		wrong = "header lines of the form Name: text";
	if (wrong == NULL && *h != '\0')
		*to = h;
	else
		free(h);
	return wrong;
}

/*
 * Addresses.
 */

static const char not_address[] = "an address: /path, port, address, name, "
    "address:port, [IPv6]:port or name:port";

static int
is_host_name(const char *p)
{
	static const char digits[] = "0123456789.", all[] = "-_"
	    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.";

	return p[strspn(p, all)] == '\0' && p[strspn(p, digits)] != '\0';
}

static const char *
target_parse(struct target *t, const struct keyword *k, const char *v)
{
	const char *first = strchr(v, ':'), *last = strrchr(v, ':');
	const char *digits = NULL;
	char host[254];
	size_t n = strlen(v);
	int64_t port = k->port;

	if (*v == '/') {
		t->naddr = 1;
		if (addr_path(&t->addr[0], v) == -1)
			return "a path of at most 107 characters";
		return NULL;
	}
	/* An IPv6 address has more colons, and brackets if a port follows. */
	if (v[strspn(v, "0123456789")] == '\0') {
		digits = v;
		v = k->host;
		n = strlen(v);
	} else if (last != NULL && (last == first || last[-1] == ']')) {
		digits = last + 1;
		n = last - v;
	}
	if (digits != NULL &&
	    (parse_number(digits, "", &port) == -1 || port > 65535))
		return not_address;
	t->port = port;
	if (v == k->host && n == 0)	/* OutAddress: the client's host */
		return NULL;
	if (*v == '[' && first != NULL && first < v + n && v[n - 1] == ']') {
		v++;
		n -= 2;
	}
	if (n >= sizeof host)
		return not_address;
	format(host, sizeof host, "%.*s", (int)n, v);
	if (addr_ip(&t->addr[0], host, port) == 0) {
		t->naddr = 1;
		return NULL;
	}
	if (!is_host_name(host))
		return not_address;
	t->name = strdup(host);
	return t->name == NULL ? no_memory : NULL;
}

static const char *
set_target(struct target **tp, const struct keyword *k, const char *v)
{
	struct target *t = calloc(1, sizeof *t);
	const char *why;

	if (t == NULL)
		return no_memory;
	t->refs = 1;
	t->text = strdup(v);
	why = t->text == NULL ? no_memory : target_parse(t, k, v);
	if (why == NULL && *v != '/' && (int)t->port < k->min)
		why = "an address with a port from 1 to 65535";
	if (why != NULL) {
		target_put(t);
		return why;
	}
	*tp = t;
	return NULL;
}

static const char *
set_clamd(struct conf *c, const struct keyword *k, const char *v)
{
	struct target *t;
	struct clamd *new;
	const char *why, *p;
	char path[64];
	size_t n;
	int i;

	if (c->nclamd == MAXCLAMDS)
		return too_many;
	if ((why = set_target(&t, k, v)) != NULL)
		return why;
	/* The default is several paths, which set_target() took for one. */
	if (c->source == BY_DEFAULT)
		for (p = v, t->naddr = 0; *p != '\0'; t->naddr++) {
			n = strcspn(p, ",");
			format(path, sizeof path, "%.*s", (int)n, p);
			addr_path(&t->addr[t->naddr], path);
			p += n + strspn(p + n, ", ");
		}
	if ((new = clamd_get(t)) == NULL)
		return no_memory;
	for (i = 0; i < c->nclamd; i++)
		if (c->clamd[i] == new) {
			logmsg(LOG_WARNING, "%s: %s is set twice; one line "
			    "is enough", k->name, v);
			clamd_put(new);
			return NULL;
		}
	c->clamd[c->nclamd++] = new;
	return NULL;
}

/*
 * ProxyFrom: networks such as 10.0.0.0/8, or the word unix.
 */

static const char *
add_network(struct conf *c, const char *word, size_t n)
{
	static const char not[] = "networks such as 10.0.0.0/8, fd00::/8, or unix";
	struct network *net = &c->proxies[c->nproxies];
	char text[64], *slash;
	int64_t bits = -1;
	int most;

	if (c->nproxies == MAXNETWORKS)
		return too_many;
	if (n >= sizeof text)
		return not;
	format(text, sizeof text, "%.*s", (int)n, word);
	if ((slash = strchr(text, '/')) != NULL) {
		*slash = '\0';
		if (parse_number(slash + 1, "", &bits) == -1)
			return not;
	}
	if (strcasecmp(text, "unix") == 0 && slash == NULL) {
		memset(net, 0, sizeof *net);
		net->addr.u.sa.sa_family = AF_UNIX;
	} else if (addr_ip(&net->addr, text, 0) == -1)
		return not;
	most = net->addr.u.sa.sa_family == AF_INET ? 32 : 128;
	if (bits > most)
		return not;
	net->bits = bits == -1 ? most : bits;
	c->nproxies++;
	return NULL;
}

/*
 * All kinds.
 */

static const char *
set_value(struct conf *c, const struct keyword *k, const char *v)
{
	void *to = field(c, k);
	const char *why = NULL, *word;
	size_t n;

	switch (k->kind) {
	case K_ON_OFF:
	case K_FAILURE:
	case K_FORMAT:
		return set_word(to, k, v);
	case K_COUNT:
	case K_SECONDS:
		return set_number(to, k, v);
	case K_SIZE:
		return set_size(to, v);
	case K_TEXT:
		return set_text(to, v);
	case K_PATH:
		return set_path(to, v);
	case K_HEADER:
		return set_header(to, v);
	case K_TARGET:
		return set_target(to, k, v);
	case K_ACTION:
		return set_action(c, v);
	case K_CLAMD:
		return set_clamd(c, k, v);
	case K_LISTEN:
		if (c->nlisten == MAXLISTEN)
			return too_many;
		why = set_target(&c->listen[c->nlisten], k, v);
		c->nlisten += why == NULL;
		break;
	case K_NETWORKS:
		while (why == NULL && (word = next_word(&v, &n), n > 0))
			why = add_network(c, word, n);
	}
	return why;
}

/* Free the value of a setting, which has none then.  Words and numbers are only
 * overwritten. */
static void
clear_value(struct conf *c, const struct keyword *k)
{
	struct target **t = field(c, k);
	char **text = field(c, k);
	struct rule *r;

	switch (k->kind) {
	case K_TEXT:
	case K_PATH:
	case K_HEADER:
		free(*text);
		*text = NULL;
		break;
	case K_TARGET:
		target_put(*t);
		*t = NULL;
		break;
	case K_ACTION:
		while ((r = c->rules) != NULL) {
			c->rules = r->next;
			free(r);
		}
		c->action = DROP;
		break;
	case K_LISTEN:
		while (c->nlisten > 0)
			target_put(c->listen[--c->nlisten]);
		break;
	case K_CLAMD:
		while (c->nclamd > 0)
			clamd_put(c->clamd[--c->nclamd]);
		break;
	case K_NETWORKS:
		c->nproxies = 0;
	}
}

/* Print to standard output, for -n. */
static void __attribute__((format(printf, 1, 2)))
put(const char *fmt, ...)
{
	char line[MAXCONFLINE + 64];
	va_list ap;
	size_t n;

	va_start(ap, fmt);
	n = vformat(line, sizeof line, fmt, ap);
	va_end(ap);
	if (write(1, line, n) == -1)
		exit(1);
}

static void
show_text(const struct keyword *k, const char *v)
{
	if (v == NULL)
		put("# %s:\n", k->name);
	else
		put("%s: %s\n", k->name, v);
}

static void
show_header(const struct keyword *k, const char *h)
{
	static const char raw[] = "\r\n\t";
	const char *p;

	put("%s: ", k->name);
	for (; h != NULL && *h != '\0'; h++)
		if ((p = strchr(raw, *h)) != NULL)
			put("\\%c", "rnt"[p - raw]);
		else
			put("%c", *h);
	put("\n");
}

static void
show_value(const struct conf *c, const struct keyword *k)
{
	static const char words[][2][9] = {
		{ "off", "on" }, { "tempfail", "pass" }, { "classic", "json" }
	};
	static const char actions[][7] = { "drop", "bounce", "pass" };
	void *p = field(c, k);
	struct target *t;
	const struct network *net;
	const struct rule *r;
	int i;

	switch (k->kind) {
	case K_ON_OFF:
	case K_FAILURE:
	case K_FORMAT:
		show_text(k, words[k->kind][*(int *)p]);
		break;
	case K_COUNT:
	case K_SECONDS:
	case K_SIZE:
		put("%s: %lld\n", k->name, (long long)*(int64_t *)p /
		    (k->kind == K_SECONDS ? SECOND : 1));
		break;
	case K_TEXT:
	case K_PATH:
		show_text(k, *(char **)p);
		break;
	case K_HEADER:
		show_header(k, *(char **)p);
		break;
	case K_TARGET:
		t = *(struct target **)p;
		show_text(k, t != NULL ? t->text : NULL);
		break;
	case K_ACTION:
		for (r = c->rules; r != NULL; r = r->next)
			put("%s: %s %s\n", k->name, actions[r->action],
			    r->pattern);
		show_text(k, actions[c->action]);
		break;
	case K_LISTEN:
		for (i = 0; i < c->nlisten; i++)
			show_text(k, c->listen[i]->text);
		break;
	case K_CLAMD:
		if (c->seen[k - keywords] != BY_DEFAULT) {
			for (i = 0; i < c->nclamd; i++)
				show_text(k, c->clamd[i]->target->text);
			break;
		}
		put("# %s: the first of these that exists\n", k->name);
		t = c->clamd[0]->target;
		for (i = 0; i < t->naddr; i++)
			put("# %s: %s\n", k->name, addr_text(&t->addr[i]));
		break;
	case K_NETWORKS:
		if (c->nproxies == 0)
			show_text(k, NULL);
		for (net = c->proxies; net < c->proxies + c->nproxies; net++)
			if (net->addr.u.sa.sa_family == AF_UNIX)
				show_text(k, "unix");
			else
				put("%s: %s/%d\n", k->name,
				    addr_text(&net->addr), net->bits);
	}
}

/*
 * Reading.
 */

/* Returns the place of the setting that is being read, for messages. */
static const char *
place(const struct conf *c)
{
	static const char names[][13] = {
		"defaults", "command line", "", "environment"
	};
	static char text[PATH_MAX + 16];

	if (c->source != BY_FILE)
		return names[c->source];
	format(text, sizeof text, "%s:%d", c->path, c->line);
	return text;
}

/* Returns the setting, or NULL if there is none. */
static const struct keyword *
find_keyword(const char *name)
{
	size_t i;

	for (i = 0; i < NKEYWORDS; i++)
		if (strcasecmp(name, keywords[i].name) == 0)
			return &keywords[i];
	return NULL;
}

/*
 * Record that c->source sets keyword k.  The value discards an earlier one, but
 * the lines of a list only those of earlier sources.  A warning says when the
 * same source sets a value twice.
 */
static void
note_source(struct conf *c, const struct keyword *k, const char *value)
{
	unsigned char *seen = &c->seen[k - keywords];
	int is_list = k->kind >= K_ACTION;

	if (!is_list || *seen != c->source)
		clear_value(c, k);
	if (is_list)
		*seen = c->source;
	if (k->kind == K_ACTION && value[strcspn(value, blanks)] == '\0')
		seen = &c->action_seen;	/* a line without patterns */
	else if (is_list)
		return;
	if (*seen == c->source && c->source != BY_DEFAULT)
		logmsg(LOG_WARNING, "%s: %s is set twice; the last one counts",
		    place(c), k->name);
	*seen = c->source;
}

static void
assign(struct conf *c, const char *name, const char *value)
{
	const struct keyword *k = find_keyword(name);
	const char *why;

	if (k == NULL) {
		/* Kubernetes defines variables with this prefix. */
		int warn = c->source == BY_ENVIRONMENT;

		logmsg(warn ? LOG_WARNING : LOG_ERR, "%s: \"%s\" is not the "
		    "name of a setting; clamsmtpd.conf(5) has them all",
		    place(c), printable(name, strlen(name)));
		c->errors += !warn;
		return;
	}
	if (*k->now_called != '\0')
		logmsg(LOG_INFO, "%s: %s is deprecated, use %s", place(c),
		    k->name, k->now_called);
	note_source(c, *k->now_called == '\0' ? k :
	    find_keyword(k->now_called), value);
	if (*value == '\0' && k->kind != K_HEADER) {
		logmsg(LOG_ERR, "%s: %s: the value is missing", place(c),
		    k->name);
		c->errors++;
	} else if ((why = set_value(c, k, value)) != NULL) {
		logmsg(LOG_ERR, "%s: %s: \"%s\" is not %s", place(c), k->name,
		    printable(value, strlen(value)), why);
		c->errors++;
	}
}

static char *
trim(char *p)
{
	size_t n;

	p += strspn(p, blanks);
	for (n = strlen(p); n > 0 && strchr(" \t\r", p[n - 1]) != NULL; n--)
		p[n - 1] = '\0';
	return p;
}

static void
read_line(struct conf *c, char *line, size_t n)
{
	const char *why = NULL;
	char *colon, *p;

	if (memchr(line, '\0', n) != NULL)
		why = "contains a NUL byte; this must be a text file";
	else if (n > MAXCONFLINE)
		why = "is longer than 4096 bytes";
	line = trim(line);
	if (why == NULL && (*line == '\0' || *line == '#'))
		return;
	/* C0, DEL, and C1 in UTF-8.  Other text may be in any 8-bit set. */
	for (p = line; why == NULL && *p != '\0'; p++)
		if (((unsigned char)*p < ' ' && *p != '\t') || *p == 127 ||
		    ((*p & 0xff) == 0xc2 && (p[1] & 0xe0) == 0x80))
			why = "contains a control character";
	colon = strchr(line, ':');
	if (why == NULL && colon == NULL)
		why = "has no colon; it should read Name: value";
	if (why != NULL) {
		logmsg(LOG_ERR, "%s: \"%.*s\" %s", place(c), 40,
		    printable(line, strlen(line)), why);
		c->errors++;
		return;
	}
	*colon = '\0';
	assign(c, trim(line), trim(colon + 1));
}

/* Read n bytes of lines, which are changed; text[n] is written to as well. */
static void
read_text(struct conf *c, char *text, size_t n)
{
	char *p, *nl;

	for (p = text; p < text + n; p = nl + 1) {
		c->line++;
		if ((nl = memchr(p, '\n', text + n - p)) == NULL)
			nl = text + n;
		*nl = '\0';
		read_line(c, p, nl - p);
	}
}

/* Returns 1, 0 when there is no such file, or -1 when it cannot be read. */
static int
read_file(struct conf *c)
{
	static const char mark[] = "\xEF\xBB\xBF";	/* UTF-8 */
	char *text = NULL;
	size_t n = 0, skip;
	ssize_t r = -1;
	int fd = open(c->path, O_RDONLY | O_CLOEXEC);

	if (fd == -1 && errno == ENOENT)
		return 0;
	if (fd != -1 && (text = malloc(MAXFILE)) != NULL)
		while ((r = read(fd, text + n, MAXFILE - n)) > 0)
			n += r;
	if (r == -1 || n == MAXFILE) {
		logmsg(LOG_ERR, r == -1 ? "%s:" : "%s: larger than 1 MiB",
		    c->path);
		c->errors++;
		r = -1;
	} else {
		c->line = 0;
		skip = n >= 3 && memcmp(text, mark, 3) == 0 ? 3 : 0;
		read_text(c, text + skip, n - skip);
		r = 1;
	}
	close(fd);
	free(text);
	return r;
}

/* Read CLAMSMTPD_NAME=value.  A list has one value per line.  An empty value
 * counts only for Header, which may be empty. */
static void
read_environment(struct conf *c)
{
	static const char prefix[] = "CLAMSMTPD_";
	char line[MAXCONFLINE + 8], name[64];
	const char *v;
	size_t i, n, len = sizeof prefix - 1;

	for (i = 0; environ[i] != NULL; i++) {
		if (strncmp(environ[i], prefix, len) != 0 ||
		    (v = strchr(environ[i], '=')) == NULL)
			continue;
		format(name, sizeof name, "%.*s",
		    (int)(v - environ[i] - len), environ[i] + len);
		do {
			n = strcspn(++v, "\n");
			format(line, sizeof line, "%s: %.*s", name, (int)n, v);
			if (n > 0 || strcasecmp(name, "Header") == 0)
				read_line(c, line, strlen(line));
			v += n;
		} while (*v != '\0');
	}
}

struct conf *
conf_load(const char *path, const char *const (*flags)[2], int nflags,
    const char *pidfile)
{
	struct conf *c = calloc(1, sizeof *c);
	char text[sizeof defaults];
	const unsigned char *out_seen;
	int n, there;

	if (c == NULL || (set_path(&c->path, path) != NULL &&
	    set_text(&c->path, path) != NULL)) {
		logmsg(LOG_ERR, "settings:");
		free(c);
		return NULL;
	}
	c->refs = 1;
	memcpy(text, defaults, sizeof text);
	read_text(c, text, sizeof text - 1);
	c->source = BY_FLAG;
	for (n = 0; n < nflags; n++)
		assign(c, flags[n][0], flags[n][1]);
	c->source = BY_FILE;
	there = read_file(c);
	c->source = BY_ENVIRONMENT;
	read_environment(c);
	/* An OutAddress with a bad value is not missing.  A file that cannot be
	 * read may have one. */
	out_seen = &c->seen[find_keyword("OutAddress") - keywords];
	if (there == 0 && *out_seen != BY_ENVIRONMENT)
		logmsg(LOG_WARNING, "%s: no such file", c->path);
	if (there != -1 && *out_seen == BY_DEFAULT && !c->transparent) {
		logmsg(LOG_ERR, "%s: OutAddress is missing; set it to the mail "
		    "server that gets the mail, such as 127.0.0.1:10026",
		    c->path);
		c->errors++;
	}
	c->source = BY_FLAG;		/* -p overrides all */
	if (pidfile != NULL)
		assign(c, "PidFile", pidfile);
	if (c->scantimeout == 0)
		c->scantimeout = c->timeout;
	c->listen[c->nlisten] = c->status;
	c->listen[c->nlisten + 1] = NULL;
	if (c->errors > 0) {
		conf_put(c);
		return NULL;
	}
	return c;
}

void
conf_show(const struct conf *c)
{
	size_t i;

	for (i = 0; i < NKEYWORDS; i++)
		if (*keywords[i].now_called == '\0')
			show_value(c, &keywords[i]);
}

void
conf_put(struct conf *c)
{
	size_t i;

	if (c == NULL || --c->refs > 0)
		return;
	for (i = 0; i < NKEYWORDS; i++)
		clear_value(c, &keywords[i]);
	free(c->path);
	free(c);
}
