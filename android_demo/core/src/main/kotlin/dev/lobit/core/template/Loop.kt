package dev.lobit.core.template

/** The variable `loop` of a `for`, and its items; like Jinja's it looks only as far ahead as it is asked to. */
internal class Loop(private val work: Work, items: Iterator<Any?>, private val counted: Long?) {
    private var rest = items
    private var ahead: Any? = ABSENT
    private var current: Any? = ABSENT
    private var before: Any? = ABSENT
    private var changed: List<Any?>? = null
    private var index0 = -1L
    private var known: Long? = null

    val length: Long get() = known ?: (counted ?: counting()).also { known = it }

    private fun counting(): Long {
        val all = work.listed(Once(rest))
        rest = all.iterator()
        return all.size + index0 + 1 + if (ahead === ABSENT) 0 else 1
    }

    private fun peek(): Any? {
        if (ahead === ABSENT && rest.hasNext()) ahead = rest.next()
        return ahead
    }

    /** The next item, or [ABSENT] after the last one. */
    fun next(): Any? {
        val item = peek()
        ahead = ABSENT
        if (item !== ABSENT) {
            index0++
            before = current
            current = item
        }
        return item
    }

    fun attribute(name: String): Any? = when (name) {
        "index" -> index0 + 1
        "index0" -> index0
        "first" -> index0 == 0L
        "last" -> peek() === ABSENT
        "length" -> length
        "revindex" -> length - index0
        "revindex0" -> length - index0 - 1
        "previtem" -> if (index0 == 0L) Undefined("the item before the first") else before
        "nextitem" -> peek().or(Undefined("the item after the last"))
        "depth" -> 1L
        "depth0" -> 0L
        "cycle" -> Callable(name) { given -> cycled(given.positional) }
        "changed" -> Callable(name) { given -> changed(given.positional) }
        else -> Undefined("loop.$name")
    }

    private fun cycled(values: List<Any?>): Any? =
        if (values.isEmpty()) broken("loop.cycle has nothing to choose from") else values[(index0 % values.size).toInt()]

    private fun changed(values: List<Any?>): Boolean {
        val same = changed?.let { work.equal(it, values) } ?: false
        changed = values
        return !same
    }
}
