/* What time and the child's end do to a job. */
#include "attach.h"
#include "guest_limits.h"
#include "job.h"

/* Whether it has ended and its output has been read. */
static bool advance_exec(struct Job *job, uint64_t now) {
    if (job->timeout <= now && !job->reaped && !job->timed_out) {
        job->timed_out = true;
        job->patience = now + KILL_PATIENCE_NS;
        job_end(job);
    }
    if (job->reaped) {
        if (job->grace == NEVER) {
            job->grace = job->ended_ns + EXIT_GRACE_NS;
        }
        if (job->grace <= now) {
            job_limit_output(job);
            job->grace = job->terminal ? now + EXIT_GRACE_NS : job->grace;
        }
    }
    return (job->reaped && job_output_done(job)) || job->patience <= now;
}

static void advance_foreground(struct Job *job, uint64_t now) {
    struct Bytes body = {0};
    if (advance_exec(job, now)) {
        process_pack_end(job, &body);
        job_reply(job, &body);
        bytes_free(&body);
    }
}

static void advance_lasting(struct Job *job, uint64_t now) {
    if (job->forgotten) {
        return;
    }
    if (job->process->user == NULL && job->control.fd < 0) {
        job_fault(job, "internal", "the process ended before it was started");
        return;
    }
    if (job->process->user != NULL && !job->complete && advance_exec(job, now)) {
        job->complete = true;
        job->out_left = job->errors_left = 0;
        loop_close(&job->in);
        bytes_free(&job->input);
        job->strange = 0;
        if (job->terminal) {
            loop_close(&job->out);
        }
    }
    attachments_advance(job, now);
}

static void advance_operation(struct Job *job) {
    if (job->replied && job->out.fd < 0) {
        job_reply(job, &job->result);
    } else if (!job->replied && job->control.fd < 0) {
        job_fault(job, "internal", "the guest's worker for this request died");
    }
}

void job_advance(struct Job *job, uint64_t now) {
    if (job->owner != NULL && job->deadline <= now) {
        job_fault(job, "deadline_exceeded", "the request was not done by its deadline");
    }
    if (job->ring != NULL) {
        advance_lasting(job, now);
        return;
    }
    if (job->owner == NULL) {
        return;
    }
    job_send_notice(job);
    if (job->process != NULL) {
        advance_foreground(job, now);
    } else {
        advance_operation(job);
    }
}

/* --- deadlines ---------------------------------------------------------------------------------------------- */

static uint64_t earlier(uint64_t left, uint64_t right) { return left < right ? left : right; }

uint64_t job_deadline(const struct Job *job) {
    uint64_t deadline = job->owner != NULL ? job->deadline : NEVER;
    if (job->forgotten || (job->owner == NULL && job->ring == NULL)) {
        return deadline;
    }
    deadline = earlier(deadline, attachments_deadline(job));
    if (job->complete) { /* (the pipes may be held for longer) */
        bool waits = job_is_spent(job) && job->attachments == NULL;
        return waits ? earlier(deadline, job->ended_ns + KEEP_ENDED_NS) : deadline;
    }
    if (!job->timed_out && !job->reaped) {
        deadline = earlier(deadline, job->timeout);
    }
    if ((job->out_left == SIZE_MAX && job->errors_left == SIZE_MAX) || (job->terminal && attachments_room(job) > 0)) {
        deadline = earlier(deadline, job->grace);
    }
    return earlier(deadline, job->patience);
}
