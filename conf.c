/*
 * The settings.  One table describes all `Name: value' lines and has the
 * defaults, which pass through the same setters.
 */

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <unistd.h>

#include "clamsmtpd.h"

#define MAXFILE		(1 << 20)	/* bytes of a configuration file */
#define MAXCONFLINE	4096

/* Without a ClamAddress the first of these that exists is used. */
static const char *const clamd_paths[] = {
	"/run/clamav/clamd.sock",	/* upstream, Alpine */
	"/var/run/clamav/clamd.ctl",	/* Debian */
	"/var/run/clamav/clamd",	/* the default of ClamSMTP 1.10 */
};
#define NPATHS	((int)(sizeof clamd_paths / sizeof clamd_paths[0]))

/*
 * A setter returns NULL, or the end of the message `"value" is not ...'.  The
 * value has no blanks around it, and is not empty unless may_be_empty is set.
 */
struct keyword {
	const char *name;
	const char *(*set)(struct conf *, const struct keyword *, const char *);
	void	 (*show)(const struct conf *, const struct keyword *);
	const char *def;		/* if it is not set; NULL: 0 */
	void	 (*clear)(struct conf *);	/* lists; may be repeated */
	const char *now_called;		/* of an old name: the new one */
	const char *const *words;	/* what set_word() takes */
	unsigned short off;
	short	 may_be_empty;
	int	 min, max;		/* numbers: as in the file; BYTES */
	int	 unit;			/* numbers: stored as a multiple */
};
#define BYTES	(-1)			/* no maximum, and suffixes as in 25M */

static void *
field(const struct conf *c, const struct keyword *k)
{
	return (char *)(uintptr_t)c + k->off;
}

static const char no_memory[] = "kept: out of memory";
static const char blanks[] = " \t";

static void put(const char *, ...) __attribute__((format(printf, 1, 2)));

/* Print to standard output, for -n. */
static void
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
show_value(const struct keyword *k, const char *v)
{
	if (v == NULL)
		put("# %s:\n", k->name);
	else
		put("%s: %s\n", k->name, v);
}

/*
 * Values of one word.
 */

/* The text for an error message, then words for 0 and 1 in turn. */
static const char *const on_off[] = {
	"on or off", "off", "on", "no", "yes", "false", "true", "0", "1", NULL
};
static const char *const failures[] = {
	"tempfail or pass", "tempfail", "pass", NULL
};
static const char *const formats[] = {
	"classic or json", "classic", "json", NULL
};

static const char *
set_word(struct conf *c, const struct keyword *k, const char *v)
{
	int i;

	for (i = 1; k->words[i] != NULL; i++)
		if (strcasecmp(v, k->words[i]) == 0) {
			*(int *)field(c, k) = (i - 1) & 1;
			return NULL;
		}
	return k->words[0];
}

static void
show_word(const struct conf *c, const struct keyword *k)
{
	show_value(k, k->words[1 + *(int *)field(c, k)]);
}

/* Read a number, with a suffix when a size is wanted.  Returns -1 when v is
 * none. */
static int64_t
number(const char *v, int is_size)
{
	static const char suffixes[] = "KkMmGg";
	const char *end = v + strspn(v, "0123456789"), *suffix;
	int64_t n;
	int shift = 0;

	if (parse_number(v, is_size ? suffixes : "", &n) != 1)
		return -1;
	if (*end != '\0') {
		suffix = strchr(suffixes, *end);
		shift = 10 + (suffix - suffixes) / 2 * 10;
		if (end[1] != '\0' || n > INT64_MAX >> shift)
			return -1;
	}
	return n << shift;
}

static const char *
set_number(struct conf *c, const struct keyword *k, const char *v)
{
	static char range[96];
	int64_t n = number(v, k->max == BYTES);

	if (k->max == BYTES && n == -1)
		return "a number of bytes, such as 25M, or 0 for no limit";
	format(range, sizeof range, "a number from %d to %d", k->min, k->max);
	if (k->max != BYTES && (n < k->min || n > k->max))
		return range;
	*(int64_t *)field(c, k) = n * k->unit;
	return NULL;
}

static void
show_number(const struct conf *c, const struct keyword *k)
{
	put("%s: %lld\n", k->name,
	    (long long)(*(int64_t *)field(c, k) / k->unit));
}

static const char *
set_text(struct conf *c, const struct keyword *k, const char *v)
{
	char **p = field(c, k);

	free(*p);
	*p = strdup(v);
	return *p == NULL ? no_memory : NULL;
}

/* Write the path from the root to full.  A relative path means the directory of
 * the start, also at a reload.  Returns 0, or -1 when that directory is gone. */
static int
absolute(const char *path, char full[2 * PATH_MAX])
{
	static char start[PATH_MAX];

	if (start[0] == '\0' && getcwd(start, sizeof start) == NULL &&
	    *path != '/')
		return -1;
	if (*path == '/')
		format(full, 2 * PATH_MAX, "%s", path);
	else
		format(full, 2 * PATH_MAX, "%s/%s", start, path);
	return 0;
}

static const char *
set_path(struct conf *c, const struct keyword *k, const char *v)
{
	char path[2 * PATH_MAX];
	size_t n;

	if (absolute(v, path) == -1)
		return "usable: the current directory is gone";
	if (strlen(v) >= PATH_MAX)
		return "a path of this system: it is too long";
	for (n = strlen(path); n > 1 && path[n - 1] == '/'; n--)
		path[n - 1] = '\0';
	return set_text(c, k, path);
}

static void
show_text(const struct conf *c, const struct keyword *k)
{
	show_value(k, *(char **)field(c, k));
}

/*
 * Action.
 */

static const char *const actions[] = { "drop", "bounce", "pass", "reject" };
#define NACTIONS	(sizeof actions / sizeof actions[0])

static void
clear_action(struct conf *c)
{
	struct rule *r;

	while ((r = c->rules) != NULL) {
		c->rules = r->next;
		free(r);
	}
	c->action = DROP;
}

static const char *
add_rule(struct conf *c, enum action action, const char *word, size_t n)
{
	struct rule *r, **last;

	if ((r = calloc(1, sizeof *r + n + 1)) == NULL)
		return no_memory;
	memcpy(r->pattern, word, n);
	r->action = action;
	for (last = &c->rules; *last != NULL; last = &(*last)->next)
		;
	*last = r;
	return NULL;
}

/* The value is an action and patterns of virus names.  Without a pattern the
 * action is for all viruses. */
static const char *
set_action(struct conf *c, const struct keyword *k, const char *v)
{
	const char *why = NULL;
	size_t i, n = strcspn(v, blanks);
	enum action action;

	(void)k;
	for (i = 0; i < NACTIONS && !word_equal(v, n, actions[i]); i++)
		;
	if (i == NACTIONS)
		return "bounce, drop or pass (with patterns of virus names, "
		    "if only for those)";
	action = i <= PASS ? i : BOUNCE;
	v += n;
	v += strspn(v, blanks);
	if (*v == '\0')
		c->action = action;
	for (; *v != '\0' && why == NULL; v += n, v += strspn(v, blanks)) {
		n = strcspn(v, blanks);
		why = add_rule(c, action, v, n);
	}
	return why;
}

static void
show_action(const struct conf *c, const struct keyword *k)
{
	const struct rule *r;

	for (r = c->rules; r != NULL; r = r->next)
		put("%s: %s %s\n", k->name, actions[r->action], r->pattern);
	show_value(k, actions[c->action]);
}

/* Match c against the set at *p, which is a '[', and advance *p past it.  A '['
 * without ']' is an ordinary character. */
static int
in_set(const char **p, char c)
{
	const char *q = *p + 1;
	int not = *q == '!' || *q == '^', found = 0, first = 1;

	for (q += not; *q != '\0' && (*q != ']' || first); q++, first = 0)
		if (q[1] == '-' && q[2] != ']' && q[2] != '\0') {
			found |= q[0] <= c && c <= q[2];
			q += 2;
		} else
			found |= *q == c;
	if (*q == '\0')
		return *(*p)++ == c;
	*p = q + 1;
	return found != not;
}

/* Match c against the pattern element at *p (not a star), and advance *p. */
static int
matches_one(const char **p, char c)
{
	switch (**p) {
	case '\0':
		return 0;
	case '?':
		(*p)++;
		return 1;
	case '[':
		return in_set(p, c);
	case '\\':
		if ((*p)[1] != '\0')
			(*p)++;
	}
	return *(*p)++ == c;
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

static const char *
set_header(struct conf *c, const struct keyword *k, const char *v)
{
	char *h = malloc(2 * strlen(v) + 1), *w = h;
	size_t room = BUFSZ / 4;	/* for the % sequences, too */
	const char *wrong = NULL;

	(void)k;
	if (h == NULL)
		return no_memory;
	for (; *v != '\0' && room > 64; v++) {
		room -= *v == '%' ? 64 : 1;
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
	if (wrong != NULL || *h == '\0') {
		free(h);
		h = NULL;
	}
	if (wrong == NULL) {
		free(c->header);
		c->header = h;
	}
	return wrong;
}

static void
show_header(const struct conf *c, const struct keyword *k)
{
	const char *p;

	put("%s: ", k->name);
	for (p = c->header; p != NULL && *p != '\0'; p++)
		if (*p == '\r')
			put("\\r");
		else if (*p == '\n')
			put("\\n");
		else if (*p == '\t')
			put("\\t");
		else
			put("%c", *p);
	put("\n");
}

/*
 * Addresses.
 */

static const char not_address[] = "an address: /path, port, address, name, "
    "address:port, [IPv6]:port or name:port";

/* Returns the port, or -1. */
static int
port_number(const char *v)
{
	int64_t n = number(v, 0);

	return n > 65535 ? -1 : n;
}

static int
is_host_name(const char *p)
{
	int letters = 0;

	if (*p == '\0' || strlen(p) > 253)
		return 0;
	for (; *p != '\0'; p++) {
		if (!isalnum((unsigned char)*p) && strchr("-._", *p) == NULL)
			return 0;
		if (!isdigit((unsigned char)*p) && *p != '.')
			letters = 1;
	}
	return letters;
}

/* Set the host (NULL: none) and the port of t. */
static const char *
target_host(struct target *t, const char *host, int port)
{
	if (port == -1)
		return not_address;
	t->port = port;
	if (host == NULL)
		return NULL;
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
target_parse(struct target *t, const char *v, int port)
{
	char host[256], *name = host, *rest;
	size_t n = strlen(v);

	if (*v == '/') {
		t->naddr = 1;
		if (addr_path(&t->addr[0], v) == -1)
			return "a path of at most 107 characters";
		return NULL;
	}
	if (n >= sizeof host)
		return not_address;
	if (v[strspn(v, "0123456789")] == '\0')
		return target_host(t, NULL, port_number(v));
	memcpy(host, v, n + 1);
	rest = strchr(host, ':');
	if (*host == '[') {
		name++;
		if (rest == NULL || (rest = strchr(rest, ']')) == NULL)
			return not_address;
		*rest++ = '\0';
	} else if (rest == NULL || strchr(rest + 1, ':') != NULL)
		rest = host + n;	/* no port, but maybe IPv6 */
	if (*rest == ':') {
		*rest = '\0';
		port = port_number(rest + 1);
	} else if (*rest != '\0')
		return not_address;
	return target_host(t, name, port);
}

/* k->min is the lowest port that is allowed, k->max the default. */
static const char *
target_new(struct target **tp, const struct keyword *k, const char *v)
{
	struct target *t = calloc(1, sizeof *t);
	const char *why;

	if (t == NULL)
		return no_memory;
	t->refs = 1;
	t->text = strdup(v);
	why = t->text == NULL ? no_memory : target_parse(t, v, k->max);
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
set_target(struct conf *c, const struct keyword *k, const char *v)
{
	struct target **t = field(c, k);

	target_put(*t);
	*t = NULL;
	return target_new(t, k, v);
}

static void
show_target(const struct conf *c, const struct keyword *k)
{
	const struct target *t = *(struct target **)field(c, k);

	show_value(k, t != NULL ? t->text : NULL);
}

/* Give a target that is only a port this host. */
static void
target_default_host(struct target *t, const char *host)
{
	if (t->naddr == 0 && t->name == NULL)
		target_host(t, host, t->port);
}

static void
clear_listen(struct conf *c)
{
	while (c->nlisten > 0)
		target_put(c->listen[--c->nlisten]);
}

static const char *
set_listen(struct conf *c, const struct keyword *k, const char *v)
{
	const char *why;

	if (c->nlisten == MAXLISTEN)
		return "allowed: 32 is the maximum";
	why = target_new(&c->listen[c->nlisten], k, v);
	if (why == NULL)
		target_default_host(c->listen[c->nlisten++], "0.0.0.0");
	return why;
}

static void
show_listen(const struct conf *c, const struct keyword *k)
{
	int i;

	for (i = 0; i < c->nlisten; i++)
		show_value(k, c->listen[i]->text);
}

static void
clear_clamd(struct conf *c)
{
	while (c->nclamd > 0)
		clamd_put(c->clamd[--c->nclamd]);
}

static const char *
set_clamd(struct conf *c, const struct keyword *k, const char *v)
{
	struct target *t;
	struct clamd *new;
	const char *why;
	int i;

	if (c->nclamd == MAXCLAMDS)
		return "allowed: 32 is the maximum";
	if ((why = target_new(&t, k, v)) != NULL)
		return why;
	target_default_host(t, "127.0.0.1");
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

static void
show_clamd(const struct conf *c, const struct keyword *k)
{
	int i;

	if (c->clamd_default)
		put("# %s: the first of these that exists\n", k->name);
	for (i = 0; c->clamd_default && i < NPATHS; i++)
		put("# %s: %s\n", k->name, clamd_paths[i]);
	for (i = 0; !c->clamd_default && i < c->nclamd; i++)
		show_value(k, c->clamd[i]->target->text);
}

/*
 * ProxyFrom: networks such as 10.0.0.0/8, or the word unix.
 */

static void
clear_proxy(struct conf *c)
{
	c->nproxies = 0;
}

static const char *
add_network(struct conf *c, const char *word, size_t n)
{
	static const char not[] = "networks such as 10.0.0.0/8, fd00::/8, or unix";
	struct network *net = &c->proxies[c->nproxies];
	char text[64], *slash;
	int64_t bits = -1;

	if (c->nproxies == MAXNETWORKS)
		return "allowed: 32 is the maximum";
	if (n >= sizeof text)
		return not;
	format(text, sizeof text, "%.*s", (int)n, word);
	if ((slash = strchr(text, '/')) != NULL) {
		*slash = '\0';
		if ((bits = number(slash + 1, 0)) == -1)
			return not;
	}
	if (strcasecmp(text, "unix") == 0 && slash == NULL) {
		memset(net, 0, sizeof *net);
		net->addr.u.sa.sa_family = AF_UNIX;
	} else if (addr_ip(&net->addr, text, 0) == -1)
		return not;
	net->bits = net->addr.u.sa.sa_family == AF_INET ? 32 : 128;
	if (bits > net->bits)
		return not;
	if (bits != -1)
		net->bits = bits;
	c->nproxies++;
	return NULL;
}

static const char *
set_proxy(struct conf *c, const struct keyword *k, const char *v)
{
	const char *why = NULL;
	size_t n;

	(void)k;
	for (; *v != '\0' && why == NULL; v += n, v += strspn(v, blanks)) {
		n = strcspn(v, blanks);
		why = add_network(c, v, n);
	}
	return why;
}

static void
show_proxy(const struct conf *c, const struct keyword *k)
{
	const struct network *net;

	if (c->nproxies == 0)
		show_value(k, NULL);
	for (net = c->proxies; net < c->proxies + c->nproxies; net++)
		if (net->addr.u.sa.sa_family == AF_UNIX)
			show_value(k, "unix");
		else
			put("%s: %s/%d\n", k->name, addr_text(&net->addr),
			    net->bits);
}

#define OFF(field)	.off = offsetof(struct conf, field)
#define TEXT		.set = set_text, .show = show_text
#define PATH		.set = set_path, .show = show_text
#define TARGET		.set = set_target, .show = show_target
#define WORD(w)		.set = set_word, .show = show_word, .words = w
#define NUMBER(u)	.set = set_number, .show = show_number, .unit = u
#define LIST(name)	.set = set_##name, .show = show_##name, \
			.clear = clear_##name

/* Promise 9: all settings of the original, with its defaults. */
static const struct keyword keywords[] = {
	{ "OutAddress", TARGET, OFF(out), .min = 1, .max = 25 },
	{ "Listen", LIST(listen), .max = 10025, .def = "10025" },
	{ "ClamAddress", LIST(clamd), .min = 1, .max = 3310 },
	{ "Action", LIST(action) },
	{ "Header", .set = set_header, .show = show_header,
	  .def = "X-Virus-Scanned: ClamAV using ClamSMTP", .may_be_empty = 1 },
	{ "Quarantine", WORD(on_off), OFF(quarantine) },
	{ "VirusAction", TEXT, OFF(virusaction) },
	{ "ScanFailure", WORD(failures), OFF(failopen) },
	{ "ScanTimeOut", NUMBER(SECOND), OFF(scantimeout), .min = 1, .max = 86400 },
	{ "MaxScans", NUMBER(1), OFF(maxscans), .min = 1, .max = 1000, .def = "10" },
	{ "MaxScanSize", NUMBER(1), OFF(maxscansize), .max = BYTES },
	{ "MaxConnections", NUMBER(1), OFF(maxconn), .min = 2, .max = 65535,
	  .def = "64" },
	{ "TimeOut", NUMBER(SECOND), OFF(timeout), .min = 1, .max = 86400,
	  .def = "180" },
	{ "KeepAlives", NUMBER(SECOND), OFF(keepalives), .max = 86400 },
	{ "XClient", WORD(on_off), OFF(xclient) },
	{ "TransparentProxy", WORD(on_off), OFF(transparent) },
	{ "TempDirectory", PATH, OFF(tempdir), .def = "/tmp" },
	{ "PidFile", PATH, OFF(pidfile) },
	{ "User", TEXT, OFF(user) },
	{ "ProxyFrom", LIST(proxy) },
	{ "StatusListen", TARGET, OFF(status), .min = 1, .max = 10080 },
	{ "LogFormat", WORD(formats), OFF(json) },
	{ "DebugFiles", WORD(on_off), OFF(debug_files) },
	{ "ScanHeader", .set = set_header, .now_called = "Header",
	  .may_be_empty = 1 },
	/* Off is DROP, and on is BOUNCE. */
	{ "Bounce", .set = set_word, .words = on_off, OFF(action),
	  .now_called = "Action" },
};
#define NKEYWORDS	(sizeof keywords / sizeof keywords[0])

/* The source of a setting.  A later one overrides an earlier one. */
enum source { BY_NOBODY, BY_FLAG, BY_FILE, BY_ENVIRONMENT };

/* The place of a setting, for messages. */
struct place {
	const char *where;
	int	 line;			/* 0: no line number */
	enum source source;
	int	 errors;
};

static const char *
place_text(const struct place *at)
{
	static char text[PATH_MAX + 16];

	if (at->line == 0)
		return at->where;
	format(text, sizeof text, "%s:%d", at->where, at->line);
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

/* Returns the source of OutAddress, whether its value was good or not. */
static enum source
out_source(const struct conf *c)
{
	return c->seen[find_keyword("OutAddress") - keywords];
}

/*
 * Record that at->source sets keyword k.  The first line of a list discards the
 * lines of earlier sources.  A setting that is no list is warned about when it
 * is set twice.
 */
static void
note_source(struct conf *c, const struct place *at, const struct keyword *k,
    const char *value)
{
	unsigned char *seen = &c->seen[k - keywords];

	if (k->clear != NULL && *seen != at->source) {
		k->clear(c);
		*seen = at->source;
	}
	if (k->set == set_action) {	/* a line with patterns adds rules */
		if (value[strcspn(value, blanks)] != '\0')
			return;
		seen = &c->action_seen;
	} else if (k->clear != NULL)
		return;
	if (*seen == at->source && at->source != BY_NOBODY)
		logmsg(LOG_WARNING, "%s: %s is set twice; the last one counts",
		    place_text(at), k->name);
	*seen = at->source;
}

static void
assign(struct conf *c, struct place *at, const char *name, const char *value)
{
	const struct keyword *k = find_keyword(name);
	const char *why;

	if (k == NULL) {
		/* Kubernetes defines variables with this prefix. */
		int warn = at->source == BY_ENVIRONMENT;

		logmsg(warn ? LOG_WARNING : LOG_ERR, "%s: \"%s\" is not the "
		    "name of a setting; clamsmtpd.conf(5) has them all",
		    place_text(at), printable(name, strlen(name)));
		at->errors += !warn;
		return;
	}
	if (k->now_called != NULL)
		logmsg(LOG_INFO, "%s: %s is deprecated, use %s",
		    place_text(at), k->name, k->now_called);
	note_source(c, at, k->now_called == NULL ? k :
	    find_keyword(k->now_called), value);
	if (*value == '\0' && !k->may_be_empty) {
		logmsg(LOG_ERR, "%s: %s: the value is missing", place_text(at),
		    k->name);
		at->errors++;
	} else if ((why = k->set(c, k, value)) != NULL) {
		logmsg(LOG_ERR, "%s: %s: \"%s\" is not %s", place_text(at),
		    k->name, printable(value, strlen(value)), why);
		at->errors++;
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
read_line(struct conf *c, struct place *at, char *line, size_t n)
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
	for (p = line; why == NULL && *p != '\0'; p++)
		if ((unsigned char)*p < ' ' && *p != '\t')
			why = "contains a control character";
	colon = strchr(line, ':');
	if (why == NULL && colon == NULL)
		why = "has no colon; it should read Name: value";
	if (why != NULL) {
		logmsg(LOG_ERR, "%s: \"%.*s\" %s", place_text(at), 40,
		    printable(line, strlen(line)), why);
		at->errors++;
		return;
	}
	*colon = '\0';
	assign(c, at, trim(line), trim(colon + 1));
}

/* Returns up to size bytes of a file in *text, and their number, or -1. */
static ssize_t
slurp(const char *path, char **text, size_t size)
{
	ssize_t n = 0, r = -1;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	*text = NULL;
	if (fd == -1)
		return -1;
	if ((*text = malloc(size)) != NULL)
		while ((r = read(fd, *text + n, size - n)) > 0)
			n += r;
	close(fd);
	return r == -1 ? -1 : n;
}

/* Returns 1, 0 when there is no such file, or -1 when it cannot be read. */
static int
read_file(struct conf *c, struct place *at, const char *path)
{
	static const char mark[] = "\xEF\xBB\xBF";	/* UTF-8 */
	char *text, *p, *nl;
	ssize_t n = slurp(path, &text, MAXFILE);
	int there = n == -1 && errno == ENOENT ? 0 :
	    n == -1 || n == MAXFILE ? -1 : 1;

	if (there == -1) {
		logmsg(LOG_ERR, n == -1 ? "%s:" : "%s: larger than 1 MiB", path);
		at->errors++;
	}
	*at = (struct place){ path, 0, BY_FILE, at->errors };
	p = n >= 3 && memcmp(text, mark, 3) == 0 ? text + 3 : text;
	for (; there == 1 && p < text + n; p = nl + 1) {
		at->line++;
		if ((nl = memchr(p, '\n', text + n - p)) == NULL)
			nl = text + n;
		*nl = '\0';
		read_line(c, at, p, nl - p);
	}
	free(text);
	return there;
}

/* Read CLAMSMTPD_NAME=value.  A list has one value per line.  An empty value
 * counts only for Header, which may be empty. */
static void
read_environment(struct conf *c, struct place *at)
{
	static const char prefix[] = "CLAMSMTPD_";
	char line[MAXCONFLINE + 8], name[64];
	const char *v;
	size_t i, n, len = sizeof prefix - 1;

	*at = (struct place){ "environment", 0, BY_ENVIRONMENT, at->errors };
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
				read_line(c, at, line, strlen(line));
			v += n;
		} while (*v != '\0');
	}
}

/* Without a ClamAddress there is one clamd, which has the usual paths. */
static void
usual_clamd(struct conf *c, struct place *at)
{
	char text[ADDRTEXT];
	struct target *t;
	size_t n = 0;
	int i;

	for (i = 0; i < NPATHS; i++)
		n += format(text + n, sizeof text - n, "%s%s",
		    i > 0 ? ", " : "", clamd_paths[i]);
	assign(c, at, "ClamAddress", text);
	if (c->nclamd == 0)
		return;			/* out of memory, already logged */
	c->clamd_default = 1;
	t = c->clamd[0]->target;
	for (i = 0; i < NPATHS; i++)
		addr_path(&t->addr[i], clamd_paths[i]);
	t->naddr = NPATHS;
}

/*
 * Set the defaults, and check OutAddress.  there is the result of read_file():
 * an unreadable file (-1) may have an OutAddress.
 */
static void
complete(struct conf *c, struct place *at, const char *path, int there)
{
	const struct keyword *k;

	*at = (struct place){ "defaults", 0, BY_NOBODY, at->errors };
	for (k = keywords; k < keywords + NKEYWORDS; k++)
		if (k->def != NULL && c->seen[k - keywords] == BY_NOBODY)
			assign(c, at, k->name, k->def);
	if (c->nclamd == 0)
		usual_clamd(c, at);
	if (c->scantimeout == 0)
		c->scantimeout = c->timeout;
	if (c->status != NULL)
		target_default_host(c->status, "127.0.0.1");
	c->listen[c->nlisten] = c->status;
	c->listen[c->nlisten + 1] = NULL;
	if (out_source(c) == BY_NOBODY && !c->transparent && there != -1) {
		logmsg(LOG_ERR, "%s: OutAddress is missing; set it to the mail "
		    "server that gets the mail, such as 127.0.0.1:10026", path);
		at->errors++;
	}
}

struct conf *
conf_load(const char *path, const char *const (*flags)[2], int nflags,
    const char *pidfile)
{
	struct conf *c = calloc(1, sizeof *c);
	struct place at = { "command line", 0, BY_FLAG, 0 };
	char full[2 * PATH_MAX];
	int n, there;

	if (absolute(path, full) == 0)
		path = full;
	if (c == NULL || (c->path = strdup(path)) == NULL) {
		logmsg(LOG_ERR, "settings:");
		free(c);
		return NULL;
	}
	c->refs = 1;
	for (n = 0; n < nflags; n++)
		assign(c, &at, flags[n][0], flags[n][1]);
	there = read_file(c, &at, path);
	read_environment(c, &at);
	if (there == 0 && out_source(c) != BY_ENVIRONMENT)
		logmsg(LOG_WARNING, "%s: no such file", path);
	complete(c, &at, path, there);
	at.where = "command line";
	if (pidfile != NULL)
		assign(c, &at, "PidFile", pidfile);
	if (at.errors > 0) {
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
		if (keywords[i].show != NULL)
			keywords[i].show(c, &keywords[i]);
}

void
conf_put(struct conf *c)
{
	if (c == NULL || --c->refs > 0)
		return;
	clear_action(c);
	clear_listen(c);
	clear_clamd(c);
	target_put(c->out);
	target_put(c->status);
	free(c->path);
	free(c->header);
	free(c->virusaction);
	free(c->tempdir);
	free(c->pidfile);
	free(c->user);
	free(c);
}
