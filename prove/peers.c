/*
 * Proofs of the parsers for the first bytes from a next hop and a load
 * balancer.  reply_code() is tried with every three bytes before each kind of
 * fourth.  The PROXY parser is tried with every beginning of three bytes and
 * every wrong byte, and compared with the definition in fuzz/proxy.c.
 */

#include "../fuzz/proxy.c"
#include "prove.h"

static unsigned long long runs;

/* RFC 5321 4.2: a code is 200 to 599.  A blank, a hyphen or the end of the line
 * follows it. */
static void
check_codes(void)
{
	static const unsigned char fourth[] = {
		' ', '-', '\r', '\n', '\0', '\t', '\v', '\f', '.', ',', '_', '/',
		'0', '9', 'a', ' ' + 128, '-' + 128, '\r' + 128, 127, 255
	};
	static short codes[1 << 24];
	char text[4];
	long i;
	size_t k, n;
	int code, want;

	for (code = 200; code < 600; code++) {
		snprintf(text, sizeof text, "%d", code);
		codes[text[0] << 16 | text[1] << 8 | text[2]] = code;
	}
	for (i = 0; i < 1 << 24; i++)
		for (k = 0; k < sizeof fourth; k++, runs++) {
			text[0] = i >> 16;
			text[1] = i >> 8;
			text[2] = i;
			text[3] = fourth[k];
			want = k < 4 ? codes[i] : 0;
			CHECK(reply_code(text, 4) == want, "%s: code %d, not %d",
			    show(text, 4), reply_code(text, 4), want);
		}
	for (n = 0; n < 4; n++)
		CHECK(reply_code("250 ", n) == 0, "a code in %zu bytes", n);
}

static void
check_proxy(const void *p, size_t n)
{
	check(p, n);
	runs++;
}

/* Check a header of version 2 with these bytes after the signature. */
static void
check_v2(int version, int family, unsigned len)
{
	static unsigned char p[16 + PROXYSZ + 2] = "\r\n\r\n\0\r\nQUIT\n";
	size_t i;

	p[12] = version;
	p[13] = family;
	p[14] = len >> 8;
	p[15] = len;
	for (i = 16; i < 80; i++)
		p[i] = i;
	check_proxy(p, 14);
	check_proxy(p, 16);
	if (len <= PROXYSZ) {
		if (len > 0)
			check_proxy(p, 15 + len);
		check_proxy(p, 16 + len);
		check_proxy(p, 17 + len);
	}
}

static void
check_beginnings(void)
{
	static const struct {
		const char *p;
		size_t	 n;
	} header[] = {
		{ "\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" "abcdefghijkl", 28 },
		{ "PROXY TCP4 192.0.2.1 192.0.2.2 12345 25\r\n", 41 },
		{ "PROXY TCP6 2001:db8::1 2001:db8::2 65535 25\r\n", 45 },
		{ "PROXY UNKNOWN\r\n", 15 },
	};
	static const unsigned lens[] = {
		0, 1, 11, 12, 13, 35, 36, 37, 255, 256, PROXYSZ, PROXYSZ + 1, 65535
	};
	char text[64];
	long i;
	size_t h, k, n;
	int byte, family;

	for (i = 0; i < 1 << 24; i++) {
		text[0] = i >> 16;
		text[1] = i >> 8;
		text[2] = i;
		check_proxy(text, 3);
		if ((i & 0xff) == 0)
			check_proxy(text, 2);
		if ((i & 0xffff) == 0)
			check_proxy(text, 1);
	}
	check_proxy(text, 0);

	/* Each beginning of a header, unchanged and with one byte changed. */
	for (h = 0; h < sizeof header / sizeof header[0]; h++)
		for (n = 0; n <= header[h].n; n++)
			for (k = 0; k < n; k++)
				for (byte = 0; byte < 256; byte++) {
					memcpy(text, header[h].p, n);
					text[k] = byte;
					check_proxy(text, n);
				}
	for (byte = 0; byte < 256; byte++)
		for (family = 0; family < 256; family++)
			for (k = 0; k < sizeof lens / sizeof lens[0]; k++)
				if (byte == 0x20 || byte == 0x21 || k == 3)
					check_v2(byte, family, lens[k]);
}

int
main(int argc, char **argv)
{
	(void)depth(argc, argv, 0);
	check_codes();
	printf("reply: %llu beginnings\n", runs);
	runs = 0;
	check_beginnings();
	printf("proxy: %llu headers\n", runs);
	return 0;
}
