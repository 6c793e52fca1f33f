package dev.lobit.core.template

/** `value.name` and `value[key]`, as Jinja looks them up: both try Python's attributes and the items of the value. */
internal class Access(private val work: Work, private val methods: Methods) {
    fun attribute(value: Any?, name: String): Any? {
        special(value, name)?.let { return it.value }
        methods.of(value, name)?.let { return it }
        return if (value is Map<*, *> && value.containsKey(name)) value[name] else Undefined("the field $name of ${typeOf(value)}")
    }

    fun item(value: Any?, key: Any?): Any? {
        val found = if (value is Map<*, *>) inMap(value, key) else whole(key)?.let { at(value, it) }
        if (found != null) return found.value
        if (key !is String) {
            if (value is Undefined) undefined(value)
            return Undefined("an item of ${typeOf(value)}")
        }
        special(value, key)?.let { return it.value }
        return methods.of(value, key) ?: Undefined("the item $key of ${typeOf(value)}")
    }

    /** The value of an attribute path such as `function.name`, which filters take. */
    fun path(value: Any?, path: Any?): Any? = parts(path).fold(value) { found, part -> item(found, part) }

    fun parts(path: Any?): List<Any?> = when (path) {
        null -> emptyList()
        is String -> path.split('.').map { part -> if (part.isNotEmpty() && part.all { it in '0'..'9' }) part.toLongOrNull() else part }
        else -> listOf(path)
    }

    /** A value that may be null. */
    private class Found(val value: Any?)

    private fun special(value: Any?, name: String): Found? = when (value) {
        is Undefined -> undefined(value)
        is Namespace -> if (value.values.containsKey(name)) Found(value.values[name]) else null
        is Loop -> Found(value.attribute(name))
        else -> null
    }

    private fun undefined(value: Undefined): Nothing = broken("${value.what} is undefined")

    private fun inMap(map: Map<*, *>, key: Any?): Found? {
        if (key is List<*> || key is Map<*, *>) return null
        return if (map.containsKey(key(key))) Found(map[key]) else null
    }

    /** The items of what Python indexes by numbers, or null. */
    private fun indexed(value: Any?): List<Any?>? =
        if (value is String || value is List<*> || value is TupleValue || value is RangeValue) work.sized(value) else null

    private fun at(value: Any?, index: Long): Found? {
        val items = indexed(value) ?: return null
        val place = if (index < 0) index + items.size else index
        return if (place in items.indices) Found(items[place.toInt()]) else null
    }

    fun slice(value: Any?, start: Any?, stop: Any?, step: Any?): Any? {
        if (value is Undefined) undefined(value)
        val items = indexed(value) ?: unknown("a slice of ${typeOf(value)}") // Jinja does one thing with constants, another with others
        val by = bound(step) ?: 1
        if (by == 0L) broken("a slice with the step 0")
        val size = items.size.toLong()
        val (first, last) = if (by > 0) 0L to size else -1L to size - 1
        val begin = place(bound(start), size, first, last) ?: if (by > 0) first else last
        val end = place(bound(stop), size, first, last) ?: if (by > 0) last else first
        val picked = if (by > 0) (begin until end step by) else if (begin > end) (begin downTo end + 1 step -by) else LongRange.EMPTY
        val found = picked.map { items[it.toInt()] }
        work.items(found.size.toLong())
        return when (value) {
            is String -> found.joinToString("")
            is TupleValue -> TupleValue(found)
            is RangeValue -> unknown("a slice of a range")
            else -> found
        }
    }

    private fun bound(value: Any?): Long? = if (value == null) null else {
        (whole(value) ?: broken("a slice up to ${typeOf(value)}")).coerceIn(-LARGEST_BOUND, LARGEST_BOUND)
    }

    private fun place(told: Long?, size: Long, first: Long, last: Long): Long? =
        told?.let { (if (it < 0) it + size else it).coerceIn(first, last) }

    private companion object {
        const val LARGEST_BOUND = 1L shl 40
    }
}
