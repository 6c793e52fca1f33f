package dev.lobit.core.template

import java.math.BigDecimal

/** Python's `==`. */
internal fun Work.equal(left: Any?, right: Any?): Boolean {
    step()
    val (a, b) = number(left) to number(right)
    return when {
        a != null && b != null -> compareNumbers(a, b) == 0
        left is SafeText || right is SafeText -> unknown("comparing text after the filter safe")
        left is String && right is String -> left == right
        left is List<*> && right is List<*> -> sameItems(left, right)
        left is TupleValue && right is TupleValue -> sameItems(left.items, right.items)
        left is RangeValue && right is RangeValue -> sameItems(left.items, right.items)
        left is Map<*, *> && right is Map<*, *> ->
            left.size == right.size && left.all { (key, value) -> right.containsKey(key) && equal(value, right[key]) }
        else -> left === right || (left is Undefined && right is Undefined)
    }
}

private fun Work.sameItems(left: List<*>, right: List<*>) = left.size == right.size && left.indices.all { equal(left[it], right[it]) }

/** Python's `left in right`. */
internal fun Work.contains(right: Any?, left: Any?): Boolean = when (right) {
    is String -> (left as? String ?: broken("${typeOf(left)} is looked for in text")) in right
    is Map<*, *> -> right.containsKey(key(left))
    else -> iterated(right).asSequence().any { equal(it, left) }
}

private fun compareNumbers(left: Number, right: Number): Int? = when {
    left is Long && right is Long -> left.compareTo(right)
    left.toDouble().isNaN() || right.toDouble().isNaN() -> null
    left.toDouble().isInfinite() || right.toDouble().isInfinite() -> left.toDouble().compareTo(right.toDouble())
    else -> exact(left).compareTo(exact(right))
}

private fun exact(value: Number) = if (value is Long) BigDecimal(value) else BigDecimal(value.toDouble())

/** Less than 0, 0 or more, as [left] is less than [right], the same or greater; null beside a number that is none. */
internal fun Work.compare(left: Any?, right: Any?): Int? {
    step()
    val (a, b) = number(left) to number(right)
    return when {
        a != null && b != null -> compareNumbers(a, b)
        left is String && right is String -> compareTexts(left, right)
        left is List<*> && right is List<*> -> compareItems(left, right)
        left is TupleValue && right is TupleValue -> compareItems(left.items, right.items)
        else -> broken("${typeOf(left)} and ${typeOf(right)} have no order")
    }
}

/** By code points, as Python does; Kotlin's order is by halves of surrogate pairs. */
private fun compareTexts(left: String, right: String): Int {
    var at = 0
    while (at < left.length && at < right.length) {
        val (a, b) = left.codePointAt(at) to right.codePointAt(at)
        if (a != b) return a.compareTo(b)
        at += Character.charCount(a)
    }
    return left.length.compareTo(right.length)
}

private fun Work.compareItems(left: List<*>, right: List<*>): Int? {
    for (i in 0 until minOf(left.size, right.size)) if (!equal(left[i], right[i])) return compare(left[i], right[i])
    return left.size.compareTo(right.size)
}
