package dev.lobit.demo

import java.util.concurrent.CancellationException
import java.util.concurrent.atomic.AtomicReference

/** Something that the [Store] does in the background. It is cancelled, or it finishes: the first of the two wins, on whatever thread. */
class Job {
    private enum class End { CANCELLED, FINISHED }

    private val end = AtomicReference<End?>(null)
    val isCancelled: Boolean get() = end.get() == End.CANCELLED
    val isFinished: Boolean get() = end.get() == End.FINISHED

    /** Lets the next [check] throw; without effect where [finish] came before. */
    fun cancel() {
        end.compareAndSet(null, End.CANCELLED)
    }

    /** Makes what was done valid; false where it was cancelled before. */
    fun finish(): Boolean = end.compareAndSet(null, End.FINISHED)

    /** Throws [CancellationException] where the job was cancelled. */
    fun check() {
        if (isCancelled) throw CancellationException()
    }
}
