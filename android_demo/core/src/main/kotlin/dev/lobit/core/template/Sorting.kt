package dev.lobit.core.template

/** Filters that put items in order. Unless they are told otherwise, capitals do not count. */
internal class Sorting(private val work: Work, private val access: Access) {
    fun apply(name: String, value: Any?, given: Arguments): Any? = when (name) {
        "sort" -> {
            val (reverse, exact, attribute) = given.bind(name, 0, "reverse", "case_sensitive", "attribute")
            val paths = attribute.or(null).let { if (it is String) it.split(',') else listOf(it) }
            sorted(work.listed(value), truth(reverse.or(false))) { item -> paths.map { folded(access.path(item, it), exact) } }
        }
        "dictsort" -> {
            val (exact, by, reverse) = given.bind(name, 0, "case_sensitive", "by", "reverse")
            val pairs = (value as? Map<*, *> ?: broken("${typeOf(value)} has no pairs")).entries.map { it.key to it.value }
            val byKey = when (by.or("key")) {
                "key" -> true
                "value" -> false
                else -> broken("dictsort is by key or value")
            }
            val order = sorted(pairs, truth(reverse.or(false))) { listOf(folded(if (byKey) it.first else it.second, exact)) }
            order.map { TupleValue(it.toList()) }
        }
        "unique" -> {
            val (exact, attribute) = given.bind(name, 0, "case_sensitive", "attribute")
            val seen = ArrayList<Any?>()
            Once(work.listed(value).filter { item ->
                val key = folded(access.path(item, attribute.or(null)), exact)
                seen.none { work.equal(it, key) }.also { if (it) seen += key }
            }.iterator())
        }
        else -> {
            val (exact, attribute) = given.bind(name, 0, "case_sensitive", "attribute")
            val items = work.listed(value)
            val best = sorted(items, name == "max") { listOf(folded(access.path(it, attribute.or(null)), exact)) }
            if (items.isEmpty()) Undefined("the $name of nothing") else best[0]
        }
    }

    private fun folded(value: Any?, exact: Any?): Any? = if (value is String && !truth(exact.or(false))) lower(value) else value

    private fun <T> sorted(items: List<T>, reverse: Boolean, key: (T) -> List<Any?>): List<T> {
        val keyed = items.map { it to key(it) }
        val order = Comparator<Pair<T, List<Any?>>> { a, b -> work.compare(a.second, b.second) ?: unknown("sorting by no number") }
        return keyed.sortedWith(if (reverse) order.reversed() else order).map { it.first }
    }
}
