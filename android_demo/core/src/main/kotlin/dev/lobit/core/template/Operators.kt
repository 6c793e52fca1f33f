package dev.lobit.core.template

import java.math.BigInteger

/** Python's `+`, `-`, `*`, `/`, `//`, `%` and `**`. Whole numbers that a Long does not hold are refused. */
internal fun Work.binary(operator: String, left: Any?, right: Any?): Any? {
    val (a, b) = number(left) to number(right)
    return when {
        a is Long && b is Long -> longs(operator, a, b)
        a != null && b != null -> doubles(operator, a.toDouble(), b.toDouble())
        operator == "+" -> added(left, right)
        operator == "*" && a is Long -> repeated(right, a)
        operator == "*" && b is Long -> repeated(left, b)
        operator == "%" && left is String -> unknown("the operator % on text")
        else -> unfit(operator, left, right)
    }
}

private fun unfit(operator: String, left: Any?, right: Any?): Nothing = if (left is SafeText || right is SafeText) {
    unknown("the operator $operator on text after the filter safe")
} else {
    broken("${typeOf(left)} $operator ${typeOf(right)} has no value")
}

private fun longs(operator: String, left: Long, right: Long): Number = when (operator) {
    "+" -> Math.addExact(left, right)
    "-" -> Math.subtractExact(left, right)
    "*" -> Math.multiplyExact(left, right)
    "**" -> power(left, right)
    else -> {
        if (right == 0L) broken("a division by 0")
        if (operator == "//") Math.floorDiv(left, right) else if (operator == "%") Math.floorMod(left, right) else left.toDouble() / right
    }
}

private fun power(left: Long, right: Long): Number {
    val fits = left > -LARGEST_BASE && left < LARGEST_BASE && right > -LARGEST_EXPONENT && right < LARGEST_EXPONENT
    if (!fits) broken("$left ** $right is too large")
    if (left == 0L && right < 0) broken("a division by 0")
    if (right < 0) return Math.pow(left.toDouble(), right.toDouble())
    val found = BigInteger.valueOf(left).pow(right.toInt())
    return if (found.bitLength() < Long.SIZE_BITS) found.toLong() else unknown("a number as large as $left ** $right")
}

private const val LARGEST_BASE = Work.LARGEST_TEXT
private const val LARGEST_EXPONENT = 64L

private fun doubles(operator: String, left: Double, right: Double): Double = when (operator) {
    "+" -> left + right
    "-" -> left - right
    "*" -> left * right
    "/" -> if (right == 0.0) broken("a division by 0") else left / right
    else -> unknown("the operator $operator on numbers with fractions")
}

private fun Work.added(left: Any?, right: Any?): Any = when {
    left is String && right is String -> {
        text(left.length.toLong() + right.length)
        left + right
    }
    left is List<*> && right is List<*> -> addedItems(left, right)
    left is TupleValue && right is TupleValue -> TupleValue(addedItems(left.items, right.items))
    else -> unfit("+", left, right)
}

private fun Work.addedItems(left: List<*>, right: List<*>): List<Any?> {
    items(left.size.toLong() + right.size)
    return left + right
}

private fun Work.repeated(value: Any?, times: Long): Any {
    val size = when (value) {
        is String -> value.length
        is List<*> -> value.size
        is TupleValue -> value.items.size
        else -> unfit("*", value, times)
    }
    if (times <= 0 || size == 0) return if (value is String) "" else if (value is List<*>) emptyList<Any?>() else TupleValue(emptyList())
    val whole = if (times > Work.LARGEST_TEXT) Work.LARGEST_TEXT + 1 else times * size
    if (value is String) {
        text(whole)
        return value.repeat(times.toInt())
    }
    items(whole)
    val items = if (value is TupleValue) value.items else value as List<*>
    val all = List(whole.toInt()) { items[it % size] }
    return if (value is TupleValue) TupleValue(all) else all
}

/** Python's comparisons. */
internal fun Work.compared(operator: String, left: Any?, right: Any?): Boolean = when (operator) {
    "==" -> equal(left, right)
    "!=" -> !equal(left, right)
    "in" -> contains(right, left)
    "not in" -> !contains(right, left)
    else -> {
        val order = compare(left, right)
        order != null && when (operator) {
            "<" -> order < 0
            "<=" -> order <= 0
            ">" -> order > 0
            else -> order >= 0
        }
    }
}
