/* SPDX-License-Identifier: MIT */
/*
 * The file system: inodes, and blocks from the allocator.
 *
 * A directory is a file of entries, and has "." and ".." like any other
 * names, so that walking a path knows no exceptions.
 */
#include "kernel.h"

#define INODES		64
#define BLOCK_SIZE	256
#define BLOCKS		24
#define FILE_MAX	((size_t)BLOCKS * BLOCK_SIZE)

struct inode {
	enum file_type type;
	size_t size;
	unsigned char *block[BLOCKS];	/* NULL where nothing was written */
};

/* Inode 0 is never used: 0 in a directory marks a free slot. */
static struct inode inodes[INODES];

static struct inode *inode_get(int number)
{
	if (number <= 0 || number >= INODES ||
	    inodes[number].type == FILE_NONE)
		return NULL;
	return &inodes[number];
}

int fs_truncate(int number)
{
	struct inode *node = inode_get(number);
	size_t i;

	if (!node)
		return E_NOENT;
	for (i = 0; i < BLOCKS; i++) {
		memory_free(node->block[i]);
		node->block[i] = NULL;
	}
	node->size = 0;
	return OK;
}

/* Returns how many bytes were read: fewer than n at the end of the file. */
int fs_read(int number, size_t offset, void *buffer, size_t n)
{
	struct inode *node = inode_get(number);
	unsigned char *to = buffer;
	size_t done = 0;

	if (!node)
		return E_NOENT;
	if (offset >= node->size)
		return 0;
	if (n > node->size - offset)
		n = node->size - offset;
	while (done < n) {
		size_t at = (offset + done) % BLOCK_SIZE;
		size_t part = BLOCK_SIZE - at;
		const unsigned char *block;

		if (part > n - done)
			part = n - done;
		block = node->block[(offset + done) / BLOCK_SIZE];
		if (block)
			mem_copy(to + done, block + at, part);
		else
			mem_fill(to + done, 0, part);
		done += part;
	}
	return (int)n;
}

/* Returns how many bytes were written: fewer than n when memory ends. */
int fs_write(int number, size_t offset, const void *data, size_t n)
{
	struct inode *node = inode_get(number);
	const unsigned char *from = data;
	size_t done = 0;

	if (!node)
		return E_NOENT;
	if (offset > FILE_MAX || n > FILE_MAX - offset)
		return E_NOSPC;
	while (done < n) {
		size_t at = (offset + done) % BLOCK_SIZE;
		size_t part = BLOCK_SIZE - at;
		unsigned char **block;

		if (part > n - done)
			part = n - done;
		block = &node->block[(offset + done) / BLOCK_SIZE];
		if (!*block) {
			*block = memory_alloc(BLOCK_SIZE);
			if (!*block)
				break;
			mem_fill(*block, 0, BLOCK_SIZE);
		}
		mem_copy(*block + at, from + done, part);
		done += part;
		if (offset + done > node->size)
			node->size = offset + done;
	}
	return done || !n ? (int)done : E_NOMEM;
}

int fs_info(int number, struct file_info *info)
{
	const struct inode *node = inode_get(number);

	if (!node)
		return E_NOENT;
	info->type = node->type;
	info->size = node->size;
	return OK;
}

/* The entry in a slot of a directory; E_NOENT after the last. */
int fs_entry(int directory, size_t index, struct dir_entry *entry)
{
	const struct inode *node = inode_get(directory);
	int n;

	if (!node)
		return E_NOENT;
	if (node->type != FILE_DIRECTORY)
		return E_NOTDIR;
	n = fs_read(directory, index * sizeof(*entry), entry, sizeof(*entry));
	return n == (int)sizeof(*entry) ? OK : E_NOENT;
}

/* The slot of a name in a directory, or an error. */
static int entry_find(int directory, const char *name, struct dir_entry *entry)
{
	int slot, error;

	for (slot = 0;; slot++) {
		error = fs_entry(directory, (size_t)slot, entry);
		if (error)
			return error;
		if (entry->inode && str_cmp(entry->name, name) == 0)
			return slot;
	}
}

static int entry_add(int directory, const char *name, int inode)
{
	struct dir_entry entry;
	size_t slot = 0;
	int n;

	while (fs_entry(directory, slot, &entry) == OK && entry.inode)
		slot++;
	mem_fill(&entry, 0, sizeof(entry));
	entry.inode = (uint16_t)inode;
	str_copy(entry.name, name, sizeof(entry.name));
	n = fs_write(directory, slot * sizeof(entry), &entry, sizeof(entry));
	return n < 0 ? n : OK;
}

static void entry_clear(int directory, int slot)
{
	struct dir_entry none;

	mem_fill(&none, 0, sizeof(none));
	fs_write(directory, (size_t)slot * sizeof(none), &none, sizeof(none));
}

/*
 * Follows a path to the directory of its last part, which is copied to
 * name ("." if there is none). Returns the directory, or an error.
 */
static int walk(int from, const char *path, char name[FS_NAME])
{
	struct dir_entry entry;
	int slot;

	if (*path == '/')
		from = FS_ROOT;
	str_copy(name, ".", FS_NAME);
	for (;;) {
		size_t n = 0;

		while (*path == '/')
			path++;
		if (!*path)
			return from;
		slot = entry_find(from, name, &entry);
		if (slot < 0)
			return slot;
		from = entry.inode;
		for (; *path && *path != '/'; path++) {
			if (n + 1 == FS_NAME)
				return E_INVAL;
			name[n++] = *path;
		}
		name[n] = '\0';
	}
}

/* The inode that a path names, or an error. */
int fs_lookup(int from, const char *path)
{
	char name[FS_NAME];
	struct dir_entry entry;
	int directory = walk(from, path, name);
	int slot;

	if (directory < 0)
		return directory;
	slot = entry_find(directory, name, &entry);
	return slot < 0 ? slot : entry.inode;
}

/* Makes an inode with nothing in it, or a directory with "." and "..". */
static int inode_make(enum file_type type, int parent)
{
	int number = 1, error = OK;

	while (number < INODES && inodes[number].type != FILE_NONE)
		number++;
	if (number == INODES)
		return E_NOSPC;
	mem_fill(&inodes[number], 0, sizeof(inodes[number]));
	inodes[number].type = type;
	if (type == FILE_DIRECTORY) {
		error = entry_add(number, ".", number);
		if (!error)
			error = entry_add(number, "..", parent);
	}
	if (error) {
		fs_truncate(number);
		inodes[number].type = FILE_NONE;
	}
	return error ? error : number;
}

int fs_init(void)
{
	int root;

	mem_fill(inodes, 0, sizeof(inodes));
	root = inode_make(FILE_DIRECTORY, FS_ROOT);
	return root < 0 ? root : OK;
}

/* Returns the new file's inode, or an error. */
int fs_create(int from, const char *path, enum file_type type)
{
	char name[FS_NAME];
	struct dir_entry entry;
	int directory = walk(from, path, name);
	int slot, number, error;

	if (directory < 0)
		return directory;
	slot = entry_find(directory, name, &entry);
	if (slot != E_NOENT)
		return slot < 0 ? slot : E_EXIST;
	number = inode_make(type, directory);
	if (number < 0)
		return number;
	error = entry_add(directory, name, number);
	if (error) {
		fs_truncate(number);
		inodes[number].type = FILE_NONE;
		return error;
	}
	return number;
}

static int is_dots(const char *name)
{
	return str_cmp(name, ".") == 0 || str_cmp(name, "..") == 0;
}

int fs_unlink(int from, const char *path)
{
	char name[FS_NAME];
	struct dir_entry entry, inside;
	int directory = walk(from, path, name);
	size_t i;
	int slot;

	if (directory < 0)
		return directory;
	slot = entry_find(directory, name, &entry);
	if (slot < 0)
		return slot;
	if (is_dots(name))
		return E_INVAL;
	/* What is no directory has no entries, so this ends at once. */
	for (i = 0; fs_entry(entry.inode, i, &inside) == OK; i++)
		if (inside.inode && !is_dots(inside.name))
			return E_NOTEMPTY;
	fs_truncate(entry.inode);
	inodes[entry.inode].type = FILE_NONE;
	entry_clear(directory, slot);
	return OK;
}
