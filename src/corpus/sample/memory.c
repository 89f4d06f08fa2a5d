/* SPDX-License-Identifier: MIT */
/*
 * The allocator: buddies.
 *
 * The arena is cut into blocks of 2^order cells. A block of order k lies
 * at a multiple of 2^k, so the two halves of a larger block, its buddies,
 * differ in one bit of their index. Allocating splits blocks until one
 * fits closely; freeing joins a block with its buddy for as long as the
 * buddy is free as well.
 */
#include "kernel.h"

#define CELL_SIZE	32
#define ORDERS		12
#define CELLS		((size_t)1 << (ORDERS - 1))

/* A free block's first cell holds the links of its list. */
union cell {
	struct {
		union cell *next;
		union cell *prev;
	} link;
	unsigned char bytes[CELL_SIZE];
};

/* What the first cell of a block is marked with, beside its order. */
#define MARK_FREE	0x40
#define MARK_USED	0x80
#define MARK_ORDER	0x0f

static union cell arena[CELLS];
static unsigned char mark[CELLS];
static union cell *free_list[ORDERS];

static size_t index_of(const union cell *block)
{
	return (size_t)(block - arena);
}

static void list_add(union cell *block, unsigned int order)
{
	union cell *first = free_list[order];

	block->link.next = first;
	block->link.prev = NULL;
	if (first)
		first->link.prev = block;
	free_list[order] = block;
	mark[index_of(block)] = (unsigned char)(MARK_FREE | order);
}

static void list_remove(union cell *block, unsigned int order)
{
	if (block->link.prev)
		block->link.prev->link.next = block->link.next;
	else
		free_list[order] = block->link.next;
	if (block->link.next)
		block->link.next->link.prev = block->link.prev;
	mark[index_of(block)] = 0;
}

void memory_init(void)
{
	mem_fill(mark, 0, sizeof(mark));
	mem_fill(free_list, 0, sizeof(free_list));
	list_add(arena, ORDERS - 1);
}

/* The least order whose blocks have room for so many bytes. */
static unsigned int order_for(size_t size)
{
	unsigned int order = 0;

	while (order < ORDERS && ((size_t)CELL_SIZE << order) < size)
		order++;
	return order;
}

void *memory_alloc(size_t size)
{
	unsigned int want = order_for(size), order = want;
	union cell *block;

	if (size == 0)
		return NULL;
	while (order < ORDERS && !free_list[order])
		order++;
	if (order >= ORDERS)
		return NULL;
	block = free_list[order];
	list_remove(block, order);
	/* Keep the lower half, give the upper one back, until it fits. */
	while (order > want) {
		order--;
		list_add(block + ((size_t)1 << order), order);
	}
	mark[index_of(block)] = (unsigned char)(MARK_USED | order);
	return block;
}

/* The used block that begins at an address, or NULL. */
static union cell *used_block(void *address)
{
	size_t i;

	for (i = 0; i < CELLS; i++)
		if (address == (void *)&arena[i])
			return mark[i] & MARK_USED ? &arena[i] : NULL;
	return NULL;
}

int memory_free(void *address)
{
	union cell *block;
	unsigned int order;

	if (!address)
		return OK;
	block = used_block(address);
	if (!block)
		return E_INVAL;
	order = mark[index_of(block)] & MARK_ORDER;
	mark[index_of(block)] = 0;
	while (order < ORDERS - 1) {
		size_t buddy = index_of(block) ^ ((size_t)1 << order);

		if (mark[buddy] != (MARK_FREE | order))
			break;
		list_remove(&arena[buddy], order);
		if (buddy < index_of(block))
			block = &arena[buddy];
		order++;
	}
	list_add(block, order);
	return OK;
}

void memory_info(struct memory_info *info)
{
	size_t i = 0;

	mem_fill(info, 0, sizeof(*info));
	info->total = sizeof(arena);
	while (i < CELLS) {
		unsigned int cells = 1u << (mark[i] & MARK_ORDER);

		if (mark[i] & MARK_FREE)
			info->free += cells * CELL_SIZE;
		else
			info->blocks++;
		i += cells;
	}
}

/*
 * Looks for damage: the blocks must cover the arena without a gap, no
 * free block may have a free buddy, and each must be on its list.
 */
int memory_check(void)
{
	size_t i = 0, free_blocks = 0, listed = 0;
	unsigned int order;
	union cell *block;

	while (i < CELLS) {
		order = mark[i] & MARK_ORDER;
		if (!(mark[i] & (MARK_FREE | MARK_USED)) || order >= ORDERS)
			return E_INVAL;
		if (mark[i] & MARK_FREE) {
			free_blocks++;
			if (order < ORDERS - 1 &&
			    mark[i ^ ((size_t)1 << order)] == mark[i])
				return E_INVAL;
		}
		i += (size_t)1 << order;
	}
	for (order = 0; order < ORDERS; order++)
		for (block = free_list[order]; block; block = block->link.next)
			listed += mark[index_of(block)] == (MARK_FREE | order);
	return i == CELLS && listed == free_blocks ? OK : E_INVAL;
}
