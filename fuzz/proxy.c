/*
 * Target proxy: PROXY headers.  proxy_parse() gets the whole input and each of
 * its beginnings, and is compared with proxy-protocol.txt.  In version 1 only
 * the client's address and port are compared.  The destination's may be any
 * text.
 */

#include "../smtp.c"
#include "fuzz.h"

#include <arpa/inet.h>

struct named {
	int	 family;		/* 0: no address */
	unsigned char ip[16];
	unsigned port;
};

static void
name_it(struct named *a, int family, const void *ip, unsigned port)
{
	static const unsigned char mapped[12] = { [10] = 0xff, [11] = 0xff };

	a->family = family;
	a->port = port;
	memcpy(a->ip, ip, family == AF_INET ? 4 : 16);
	if (family == AF_INET6 && memcmp(ip, mapped, 12) == 0)
		name_it(a, AF_INET, (const char *)ip + 12, port);
}

/* Returns the next word of a line, whose words are separated by one blank, or
 * NULL if there is none. */
static char *
word(char **line)
{
	return *line == NULL ? NULL : strsep(line, " ");
}

static int
ref_text(const char *p, size_t n, struct named *a)
{
	char text[108], *line = text, *family, *from, *port, ip[16];
	size_t len;
	int v6;

	for (len = 0; len < n && len < 107 && p[len] != '\n'; len++)
		text[len] = p[len];
	if (len == 107)
		return -1;
	if (len == n)
		return 0;
	if (text[len - 1] != '\r')
		return -1;
	text[len - 1] = '\0';
	if (strncmp(text, "PROXY UNKNOWN", 13) == 0)
		return len + 1;
	word(&line);
	family = word(&line);
	from = word(&line);
	word(&line);
	port = word(&line);
	if (port == NULL || (strcmp(family, "TCP4") != 0 &&
	    strcmp(family, "TCP6") != 0))
		return -1;
	v6 = family[3] == '6';
	port[strcspn(port, "\t")] = '\0';
	if (*port == '\0' || strlen(port) > 18 ||
	    strspn(port, "0123456789") != strlen(port) || atoll(port) > 65535)
		return -1;
	if (inet_pton(v6 ? AF_INET6 : AF_INET, from, ip) != 1)
		return -1;
	name_it(a, v6 ? AF_INET6 : AF_INET, ip, atoll(port));
	return len + 1;
}

static int
ref_binary(const unsigned char *p, size_t n, struct named *a)
{
	size_t len;

	if (n < 16)
		return 0;
	len = p[14] * 256 + p[15];
	if (p[12] / 16 != 2 || p[12] % 16 > 1 || len > PROXYSZ)
		return -1;
	if (n < 16 + len)
		return 0;
	if (p[12] % 16 == 1 && p[13] == 0x11) {		/* PROXY, TCP, IPv4 */
		if (len < 12)
			return -1;
		name_it(a, AF_INET, p + 16, p[24] * 256 + p[25]);
	} else if (p[12] % 16 == 1 && p[13] == 0x21) {
		if (len < 36)
			return -1;
		name_it(a, AF_INET6, p + 16, p[48] * 256 + p[49]);
	}
	return 16 + len;
}

static int
ref_parse(const char *p, size_t n, struct named *a)
{
	static const char v1[] = "PROXY ", v2[] = "\r\n\r\n\0\r\nQUIT\n";
	size_t i;

	memset(a, 0, sizeof *a);
	for (i = 0; i < n && i < 12 && p[i] == v2[i]; i++)
		;
	if (i == n || i == 12)
		return ref_binary((const unsigned char *)p, n, a);
	for (i = 0; i < n && i < 6 && p[i] == v1[i]; i++)
		;
	return i == n || i == 6 ? ref_text(p, n, a) : -1;
}

static void
check_named(const struct addr *a, const struct named *want)
{
	CHECK((a->len == 0) == (want->family == 0), "%s", addr_full(a));
	if (want->family == 0)
		return;
	CHECK(a->u.sa.sa_family == want->family && addr_port(a) == want->port,
	    "%s, port %u", addr_full(a), want->port);
	if (want->family == AF_INET)
		CHECK(a->len == sizeof a->u.in &&
		    memcmp(&a->u.in.sin_addr, want->ip, 4) == 0, "%s",
		    addr_full(a));
	else
		CHECK(a->len == sizeof a->u.in6 &&
		    memcmp(&a->u.in6.sin6_addr, want->ip, 16) == 0, "%s",
		    addr_full(a));
}

/* Parse n bytes in a buffer that ends after them. */
static int
check(const uint8_t *data, size_t n)
{
	char *copy = malloc(n + 1);		/* malloc(0) may be NULL */
	struct named want;
	struct addr a;
	int got, ref;

	CHECK(copy != NULL, "memory");
	memcpy(copy + 1, data, n);
	got = proxy_parse(copy + 1, n, &a);
	ref = ref_parse(copy + 1, n, &want);
	CHECK(got == ref, "%d of %zu bytes; reference: %d", got, n, ref);
	if (got > 0)
		check_named(&a, &want);
	free(copy);
	return got;
}

/* Parse the input byte for byte, as from a slow proxy, and then all of it at
 * once, with the bytes after the header. */
int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	size_t n;

	for (n = 0; n < size && check(data, n) == 0; n++)
		;
	check(data, size);
	return 0;
}

#include "fuzz.h"
