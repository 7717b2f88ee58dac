/*
 * Target text: format() is compared with snprintf(3), matches() with
 * fnmatch(3), addresses with inet_ntop(3) and inet_pton(3).  Byte 0 of the
 * input selects one.
 *
 * fnmatch(3), and inet_ntop(3) for IPv6, are compared only with glibc.  The
 * inet_ntop(3) of musl does not follow RFC 5952, and its fnmatch(3) treats an
 * incomplete set differently.  The target leaves out the intended differences:
 *
 *   format()	knows only %s %.*s %c %d %u %x %X, l, ll and %0N.  It returns
 *		the length of what it has written, even if that was cut.  %0N
 *		counts digits, and the sign of a negative number is not one.
 *   matches()	knows no classes ([:alpha:], [=a=], [.a.]).  A backslash in
 *		brackets or at the end of the pattern is an ordinary character.
 *		`[a-' at the end is text, where glibc matches nothing.
 *   addresses	never end in a dotted quad, which inet_ntop(3) writes for
 *		::1.2.3.4.
 */

#include "../conf.c"
#include "fuzz.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <fnmatch.h>

/* Returns a number with any sign and any number of digits. */
static long long
number_at(const uint8_t *p)
{
	long long n;

	memcpy(&n, p, sizeof n);
	return n >> (p[0] & 56);	/* small ones as often as large */
}

/* A text that is too long is cut, but not inside a character. */
#define BOTH(...) do {							\
	char a[300], b[1000];						\
	size_t got, i;							\
									\
	memset(a, '#', sizeof a);					\
	got = format(a, size, __VA_ARGS__);				\
	snprintf(b, sizeof b, __VA_ARGS__);				\
	same("format", a, got, b, got < strlen(b) ? got : strlen(b));	\
	CHECK(a[got] == '\0' && a[size] == '#', "no NUL, or too long");	\
	for (i = got + 1; i < size && i <= strlen(b); i++)		\
		CHECK((b[i] & 0xc0) == 0x80, "cut too early");		\
} while (0)

/* The input contains the size of the buffer, a width, a character, a number and
 * a text. */
static void
check_format(const uint8_t *p, size_t n)
{
	char text[300], *copy;
	size_t size = 1 + p[0], len;
	int width = p[1], c = p[2] | 1;
	long long v = number_at(p + 3), w = v < 0 ? -(v + 1) : v;

	p += 11;
	n -= 11;
	len = n < sizeof text - 1 ? n : sizeof text - 1;
	memcpy(text, p, len);
	text[len] = '\0';
	copy = malloc(len + 1);		/* no NUL after it */
	CHECK(copy != NULL, "memory");
	memset(copy + 1, 'x', len);
	len = strlen(text);
	memcpy(copy + 1, text, len);
	BOTH("%s", text);
	BOTH("%.*s", width, text);
	BOTH("%.*s|%.*s", (int)len, copy + 1, width / 2, text);
	BOTH("<%d> %c%%%c", (int)v, c, c);
	BOTH("%d %u %x %X", (int)v, (unsigned)v, (unsigned)v, (unsigned)v);
	BOTH("%ld %lu %lx", (long)v, (unsigned long)v, (unsigned long)v);
	BOTH("%lld %llu %llX", v, (unsigned long long)v, (unsigned long long)v);
	BOTH("%02d:%06X:%02ld:%08x", (int)w & INT_MAX, (unsigned)v, (long)w,
	    (unsigned)v);
	BOTH("%s, %d bytes (%s)", text, (int)v, text);
	free(copy);
}

/* The input contains a pattern, a NUL and a name.  Only printable bytes are
 * used, because names contain no others. */
static void
check_match(const uint8_t *p, size_t n)
{
	char pattern[32], name[64], *to = pattern;
	size_t i, k = 0, stars = 0;
	int brackets = 0;

	memset(pattern, 0, sizeof pattern);
	memset(name, 0, sizeof name);
	for (i = 0; i < n; i++)
		if (p[i] == 0 && to == pattern) {
			to = name;
			k = 0;
		} else if (p[i] > 32 && p[i] < 127 &&
		    k < (to == pattern ? sizeof pattern : sizeof name) - 1)
			to[k++] = p[i];
	for (i = 0; pattern[i] != '\0'; i++) {
		stars += pattern[i] == '*';
		brackets |= pattern[i] == '[';
		if (pattern[i] == '\\' && (brackets || pattern[i + 1] == '\0'))
			return;
		if (pattern[i] == '\\')
			i++;
	}
	if (i > 0 && brackets && pattern[i - 1] == '-')
		return;
	/* glibc takes long for many stars, and matches() must not. */
	if (stars > 5)
		(void)matches(pattern, name);
	if (stars > 5 || strstr(pattern, "[:") || strstr(pattern, "[.") ||
	    strstr(pattern, "[="))
		return;
#ifdef __GLIBC__
	CHECK(matches(pattern, name) == (fnmatch(pattern, name, 0) == 0),
	    "\"%s\" of \"%s\": fnmatch says %d", pattern, name,
	    fnmatch(pattern, name, 0) == 0);
#endif
}

/* The input contains 16 bytes of an address and a port. */
static void
check_address(const uint8_t *p)
{
	static const uint8_t zeros[12];
	char want[128], ip[64];
	struct addr a, b;
	unsigned port = p[16] | p[17] << 8;

	memset(&a, 0, sizeof a);
	a.len = sizeof a.u.in6;
	a.u.in6.sin6_family = AF_INET6;
	a.u.in6.sin6_port = htons(port);
	memcpy(&a.u.in6.sin6_addr, p, 16);
	inet_ntop(AF_INET6, p, ip, sizeof ip);
#ifndef __GLIBC__
	ip[0] = '.';
#endif
	if (strchr(ip, '.') == NULL && memcmp(p, zeros, 12) != 0) {
		same("IPv6", addr_text(&a), strlen(addr_text(&a)), ip,
		    strlen(ip));
		snprintf(want, sizeof want, "[%s]:%u", ip, port);
		same("IPv6 and port", addr_full(&a), strlen(addr_full(&a)), want,
		    strlen(want));
	}
	/* The daemon must read what it writes. */
	addr_unmap(&a);
	CHECK(addr_ip(&b, addr_text(&a), port) == 0 && addr_equal(&a, &b),
	    "%s is read as %s", addr_full(&a), addr_full(&b));
	memset(&a, 0, sizeof a);
	a.len = sizeof a.u.in;
	a.u.in.sin_family = AF_INET;
	a.u.in.sin_port = htons(port);
	memcpy(&a.u.in.sin_addr, p, 4);
	inet_ntop(AF_INET, p, ip, sizeof ip);
	snprintf(want, sizeof want, "%s:%u", ip, port);
	same("IPv4", addr_full(&a), strlen(addr_full(&a)), want, strlen(want));
}

/* Returns the port, which is digits up to 65535, or -1. */
static int
ref_port(const char *p)
{
	size_t n = strspn(p, "0123456789");
	const char *q = p;

	if (n == 0 || p[n] != '\0')
		return -1;
	while (*q == '0')
		q++;
	return strlen(q) > 5 || atoi(q) > 65535 ? -1 : atoi(q);
}

/* Classify an address in a configuration file.  Returns 1 for an IP address, 2
 * for a name, each with a port, 3 for a port alone, 4 for a path, 0 for none of
 * these. */
static int
ref_target(const char *v, struct addr *ip, char *name, int *port)
{
	char text[400], *host = text, *colon, *end;
	size_t i;

	*port = 77;
	if (*v == '/')
		return strlen(v) < 108 ? 4 : 0;
	strcpy(text, v);
	if (strspn(v, "0123456789") == strlen(v))
		return (*port = ref_port(v)) == -1 ? 0 : 3;
	if (*text == '[') {
		host = text + 1;
		if ((end = strchr(text, ']')) == NULL)
			return 0;
		*end++ = '\0';
		if (*end == ':' && (*port = ref_port(end + 1)) == -1)
			return 0;
		if (*end != '\0' && *end != ':')
			return 0;
		if (strchr(host, ':') == NULL)
			return 0;	/* only IPv6 has brackets */
	} else {
		colon = strchr(text, ':');
		if (colon != NULL && strchr(colon + 1, ':') == NULL) {
			*colon = '\0';
			if ((*port = ref_port(colon + 1)) == -1)
				return 0;
		}
	}
	if (addr_ip(ip, host, *port) == 0)
		return 1;
	strcpy(name, host);
	for (i = 0; host[i] != '\0'; i++)
		if (!isalnum((unsigned char)host[i]) &&
		    (host[i] == '\0' || strchr("-._", host[i]) == NULL))
			return 0;
	return i > 0 && i <= 253 &&
	    strspn(host, "0123456789.") != strlen(host) ? 2 : 0;
}

static void
check_target(const uint8_t *p, size_t n)
{
	static const struct keyword k77 = { .port = 77 };
	struct target *t = calloc(1, sizeof *t);
	struct addr ip;
	char v[400], name[400];
	const char *why;
	size_t i, k;
	int kind, port;

	CHECK(t != NULL, "memory");
	t->refs = 1;
	for (i = k = 0; i < n && k < sizeof v - 1; i++)
		if (p[i] > 32)
			v[k++] = p[i];
	v[k] = '\0';
	kind = k == 0 ? 0 : ref_target(v, &ip, name, &port);
	if (k > 0) {
		why = target_parse(t, &k77, v);
		CHECK((why == NULL) == (kind != 0), "\"%s\": %s, reference: %d",
		    v, why != NULL ? why : "accepted", kind);
	}
	if (kind == 1)
		CHECK(t->naddr == 1 && t->name == NULL &&
		    addr_equal(&t->addr[0], &ip) &&
		    addr_port(&t->addr[0]) == (unsigned)port,
		    "\"%s\" is %s", v, addr_full(&t->addr[0]));
	if (kind == 2)
		CHECK(t->naddr == 0 && strcmp(t->name, name) == 0 &&
		    t->port == (unsigned)port, "\"%s\" is %s", v, t->name);
	if (kind == 3)
		CHECK(t->naddr == 0 && t->name == NULL &&
		    t->port == (unsigned)port, "\"%s\"", v);
	if (kind == 4)
		CHECK(t->naddr == 1 && strcmp(addr_text(&t->addr[0]), v) == 0,
		    "\"%s\" is %s", v, addr_text(&t->addr[0]));
	target_put(t);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (size < 1)
		return 0;
	switch (*data++) {
	case 'f':
		if (--size >= 11)
			check_format(data, size);
		break;
	case 'm':
		check_match(data, size - 1);
		break;
	case 'a':
		if (--size >= 18)
			check_address(data);
		break;
	case 't':
		check_target(data, size - 1);
		break;
	}
	return 0;
}

#include "fuzz.h"
