/* SPDX-License-Identifier: MIT */
/*
 * The library: what a kernel needs of the C library, written again.
 */
#include "kernel.h"

size_t str_len(const char *s)
{
	const char *end = s;

	while (*end)
		end++;
	return (size_t)(end - s);
}

int str_cmp(const char *a, const char *b)
{
	while (*a && *a == *b) {
		a++;
		b++;
	}
	return (unsigned char)*a - (unsigned char)*b;
}

/*
 * Copies as much as there is room for and always ends the copy.
 * Returns the length of the original, so that a caller can tell
 * whether something was cut off.
 */
size_t str_copy(char *to, const char *from, size_t room)
{
	size_t length = str_len(from);
	size_t n = length < room ? length : room - 1;

	if (room == 0)
		return length;
	mem_copy(to, from, n);
	to[n] = '\0';
	return length;
}

/* Reads a decimal number that must fill the whole string. */
int str_to_int(const char *s, int *value)
{
	const int limit = 100000000;
	int negative = *s == '-';
	int n = 0;

	if (negative)
		s++;
	if (!*s)
		return E_INVAL;
	for (; *s; s++) {
		if (*s < '0' || *s > '9' || n >= limit)
			return E_INVAL;
		n = 10 * n + (*s - '0');
	}
	*value = negative ? -n : n;
	return OK;
}

void mem_copy(void *to, const void *from, size_t n)
{
	unsigned char *t = to;
	const unsigned char *f = from;

	while (n--)
		*t++ = *f++;
}

void mem_fill(void *to, unsigned char value, size_t n)
{
	unsigned char *t = to;

	while (n--)
		*t++ = value;
}

int mem_cmp(const void *a, const void *b, size_t n)
{
	const unsigned char *x = a, *y = b;

	for (; n; n--, x++, y++)
		if (*x != *y)
			return *x - *y;
	return 0;
}

/* Text that is being built. It counts what it has no room for. */
struct output {
	char *to;
	size_t room;
	size_t length;
};

static void put(struct output *out, char c)
{
	if (out->length + 1 < out->room)
		out->to[out->length] = c;
	out->length++;
}

static void pad(struct output *out, char c, int n)
{
	while (n-- > 0)
		put(out, c);
}

/* Writes a number's digits, backwards, and returns how many there are. */
static int digits(char *to, unsigned long n, unsigned int base)
{
	int count = 0;

	do {
		to[count++] = "0123456789abcdef"[n % base];
		n /= base;
	} while (n);
	return count;
}

static void put_number(struct output *out, unsigned long n, int negative,
		       unsigned int base, int width, int zero, int left)
{
	char text[24];
	int count = digits(text, n, base);
	int blanks = width - count - negative;

	if (!left && !zero)
		pad(out, ' ', blanks);
	if (negative)
		put(out, '-');
	if (!left && zero)
		pad(out, '0', blanks);
	while (count--)
		put(out, text[count]);
	if (left)
		pad(out, ' ', blanks);
}

/*
 * Knows %d, %u, %x, %c, %s and %%, a width, and the flags '-' and '0'.
 * Returns the length that the whole text has.
 */
size_t vformat(char *to, size_t room, const char *fmt, va_list args)
{
	struct output out = { to, room, 0 };

	for (; *fmt; fmt++) {
		int left = 0, zero = 0, width = 0, value, blanks;
		const char *s;

		if (*fmt != '%') {
			put(&out, *fmt);
			continue;
		}
		for (fmt++; *fmt == '-' || *fmt == '0'; fmt++) {
			left |= *fmt == '-';
			zero |= *fmt == '0';
		}
		for (; *fmt >= '0' && *fmt <= '9'; fmt++)
			width = 10 * width + (*fmt - '0');
		switch (*fmt) {
		case 'd':
			value = va_arg(args, int);
			/* -(value + 1) + 1: the least int has no opposite */
			put_number(&out, value < 0
				   ? (unsigned long)-(value + 1) + 1
				   : (unsigned long)value,
				   value < 0, 10, width, zero, left);
			break;
		case 'u':
		case 'x':
			put_number(&out, va_arg(args, unsigned int), 0,
				   *fmt == 'x' ? 16 : 10, width, zero, left);
			break;
		case 'c':
			put(&out, (char)va_arg(args, int));
			break;
		case 's':
			s = va_arg(args, const char *);
			blanks = width - (int)str_len(s);
			if (!left)
				pad(&out, ' ', blanks);
			while (*s)
				put(&out, *s++);
			if (left)
				pad(&out, ' ', blanks);
			break;
		case '\0':
			fmt--;
			break;
		default:
			put(&out, *fmt);
		}
	}
	if (room)
		to[out.length < room ? out.length : room - 1] = '\0';
	return out.length;
}

size_t format(char *to, size_t room, const char *fmt, ...)
{
	va_list args;
	size_t length;

	va_start(args, fmt);
	length = vformat(to, room, fmt, args);
	va_end(args);
	return length;
}

const char *error_text(int error)
{
	static const char *const text[] = {
		"no error",
		"out of memory",
		"no such file or directory",
		"already there",
		"not a directory",
		"is a directory",
		"directory not empty",
		"no space left",
		"invalid argument",
		"deadlock"
	};

	if (error > 0 || -error >= (int)ARRAY_SIZE(text))
		return "unknown error";
	return text[-error];
}
