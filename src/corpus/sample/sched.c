/* SPDX-License-Identifier: MIT */
/*
 * The scheduler: cooperative tasks on a virtual clock.
 *
 * A task is a function that does a small step and returns, and is called
 * again for the next. A step takes one tick. The ready task of the highest
 * priority goes first, among equals the one that has waited longest; and
 * since waiting slowly raises a task's rank, none waits forever.
 */
#include "kernel.h"

#define TASKS		16
#define AGING		32	/* ticks of waiting worth one priority */

static struct task tasks[TASKS];
static uint32_t now;
static int next_id;

void sched_init(void)
{
	mem_fill(tasks, 0, sizeof(tasks));
	now = 0;
	next_id = 1;
}

uint32_t clock_now(void)
{
	return now;
}

/* Returns the new task's id, which is positive, or an error. */
int task_create(const char *name, int priority,
		enum verdict (*step)(struct task *self), void *data)
{
	struct task *task;

	if (priority < 0 || priority > PRIORITY_MAX || !step)
		return E_INVAL;
	for (task = tasks; task < tasks + TASKS; task++)
		if (task->state == TASK_FREE)
			break;
	if (task == tasks + TASKS)
		return E_NOSPC;
	mem_fill(task, 0, sizeof(*task));
	str_copy(task->name, name, sizeof(task->name));
	task->id = next_id++;
	task->state = TASK_READY;
	task->priority = priority;
	task->last_run = now;
	task->step = step;
	task->data = data;
	return task->id;
}

/* The task in a slot, whatever its state, or NULL after the last. */
const struct task *task_get(int index)
{
	return index >= 0 && index < TASKS ? &tasks[index] : NULL;
}

/* Called from a step: the next one comes so many ticks later. */
void task_sleep(struct task *self, uint32_t ticks)
{
	self->state = TASK_ASLEEP;
	self->wake = now + ticks;
}

/*
 * Called from a step: takes one from the semaphore and returns 1, or
 * returns 0, and the next step comes when somebody has posted. It must
 * try again then, for another task may have been quicker.
 */
int sem_take(struct task *self, struct semaphore *sem)
{
	if (sem->count > 0) {
		sem->count--;
		return 1;
	}
	self->state = TASK_WAITING;
	self->waits_for = sem;
	return 0;
}

void sem_post(struct semaphore *sem)
{
	struct task *task, *oldest = NULL;

	sem->count++;
	for (task = tasks; task < tasks + TASKS; task++) {
		if (task->state != TASK_WAITING || task->waits_for != sem)
			continue;
		if (!oldest || task->last_run < oldest->last_run)
			oldest = task;
	}
	if (oldest) {
		oldest->state = TASK_READY;
		oldest->waits_for = NULL;
	}
}

static uint32_t rank(const struct task *task)
{
	return (uint32_t)task->priority + (now - task->last_run) / AGING;
}

static struct task *choose(void)
{
	struct task *task, *best = NULL;

	for (task = tasks; task < tasks + TASKS; task++) {
		if (task->state != TASK_READY)
			continue;
		if (!best || rank(task) > rank(best) ||
		    (rank(task) == rank(best) &&
		     task->last_run < best->last_run))
			best = task;
	}
	return best;
}

/* Wakes whoever has slept long enough; says when the next one will. */
static int wake_sleepers(uint32_t *next)
{
	struct task *task;
	int asleep = 0;

	for (task = tasks; task < tasks + TASKS; task++) {
		if (task->state != TASK_ASLEEP)
			continue;
		if (task->wake <= now) {
			task->state = TASK_READY;
			continue;
		}
		if (!asleep || task->wake < *next)
			*next = task->wake;
		asleep = 1;
	}
	return asleep;
}

static int anyone_waits(void)
{
	const struct task *task;

	for (task = tasks; task < tasks + TASKS; task++)
		if (task->state == TASK_WAITING)
			return 1;
	return 0;
}

/*
 * Runs tasks until all are done or so many ticks have passed. While all
 * of them sleep the clock jumps ahead to the first that wakes.
 */
int sched_run(uint32_t ticks)
{
	uint32_t end = now + ticks, next = 0;

	while (now < end) {
		int asleep = wake_sleepers(&next);
		struct task *task = choose();

		if (!task) {
			if (!asleep)
				return anyone_waits() ? E_DEADLOCK : OK;
			now = next < end ? next : end;
			continue;
		}
		now++;
		task->last_run = now;
		task->steps++;
		if (task->step(task) == STEP_DONE)
			task->state = TASK_FREE;
	}
	return OK;
}
