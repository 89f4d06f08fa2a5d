/* SPDX-License-Identifier: MIT */
/*
 * Pebble: a toy kernel that runs as an ordinary program.
 *
 * It has the parts of a real one, each small enough to be read in a few
 * minutes: an allocator, a scheduler, a file system in memory, a console
 * and a shell. Nothing here uses the host's library except the console.
 */
#ifndef KERNEL_H
#define KERNEL_H

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#define ARRAY_SIZE(a)	(sizeof(a) / sizeof((a)[0]))

/* What can go wrong. Functions that may fail return one of these. */
enum error {
	OK = 0,
	E_NOMEM = -1,		/* no memory left */
	E_NOENT = -2,		/* no such file or directory */
	E_EXIST = -3,		/* the name is taken */
	E_NOTDIR = -4,		/* a file where a directory is needed */
	E_ISDIR = -5,		/* a directory where a file is needed */
	E_NOTEMPTY = -6,	/* the directory has entries */
	E_NOSPC = -7,		/* no inode, task or room in a file left */
	E_INVAL = -8,		/* an argument makes no sense */
	E_DEADLOCK = -9		/* every task waits, and nobody will post */
};

/* lib.c: strings, numbers and formatted text */

size_t str_len(const char *s);
int str_cmp(const char *a, const char *b);
size_t str_copy(char *to, const char *from, size_t room);
int str_to_int(const char *s, int *value);
void mem_copy(void *to, const void *from, size_t n);
void mem_fill(void *to, unsigned char value, size_t n);
int mem_cmp(const void *a, const void *b, size_t n);
size_t format(char *to, size_t room, const char *fmt, ...);
size_t vformat(char *to, size_t room, const char *fmt, va_list args);
const char *error_text(int error);

/* console.c: the only part that talks to the host */

void con_putc(char c);
void con_puts(const char *s);
void con_printf(const char *fmt, ...);
void con_capture(char *buffer, size_t room);
size_t con_release(void);
int con_getline(char *line, size_t room);

/* memory.c: a buddy allocator */

struct memory_info {
	unsigned int total;	/* bytes in the arena */
	unsigned int free;	/* bytes in free blocks */
	unsigned int blocks;	/* blocks in use */
};

void memory_init(void);
void *memory_alloc(size_t size);
int memory_free(void *block);
void memory_info(struct memory_info *info);
int memory_check(void);

/* sched.c: cooperative tasks on a virtual clock */

#define TASK_NAME	16
#define PRIORITY_MAX	7

enum task_state {
	TASK_FREE,		/* the slot is not in use */
	TASK_READY,
	TASK_ASLEEP,		/* until the clock reaches wake */
	TASK_WAITING		/* for a semaphore */
};

/* What a task's step says when it returns. */
enum verdict {
	STEP_AGAIN,
	STEP_DONE
};

struct semaphore {
	int count;
};

struct task {
	int id;
	char name[TASK_NAME];
	enum task_state state;
	int priority;		/* 0 (lowest) to PRIORITY_MAX */
	uint32_t wake;
	uint32_t last_run;	/* when it was last given the processor */
	uint32_t steps;		/* how often that was */
	struct semaphore *waits_for;
	enum verdict (*step)(struct task *self);
	void *data;		/* belongs to the step function */
};

void sched_init(void);
int task_create(const char *name, int priority,
		enum verdict (*step)(struct task *self), void *data);
const struct task *task_get(int index);
void task_sleep(struct task *self, uint32_t ticks);
int sem_take(struct task *self, struct semaphore *sem);
void sem_post(struct semaphore *sem);
uint32_t clock_now(void);
int sched_run(uint32_t ticks);

/* fs.c: a file system in memory */

#define FS_NAME		30
#define FS_ROOT		1

enum file_type {
	FILE_NONE,
	FILE_REGULAR,
	FILE_DIRECTORY
};

struct file_info {
	enum file_type type;
	size_t size;
};

struct dir_entry {
	uint16_t inode;		/* 0 in an unused slot */
	char name[FS_NAME];
};

int fs_init(void);
int fs_lookup(int from, const char *path);
int fs_create(int from, const char *path, enum file_type type);
int fs_unlink(int from, const char *path);
int fs_read(int inode, size_t offset, void *buffer, size_t n);
int fs_write(int inode, size_t offset, const void *data, size_t n);
int fs_truncate(int inode);
int fs_info(int inode, struct file_info *info);
int fs_entry(int directory, size_t index, struct dir_entry *entry);

/* shell.c and test.c */

int shell_run_line(const char *line);
void shell_loop(void);
int self_test(void);

#endif
