package dev.lobit.core.template

/*
 * Values of templates: null, Boolean, Long, Double, String, List (of Python's lists), Map (keys are text, whole numbers or null), and the
 * classes below.
 */

/** What a name means that nothing was given for; Jinja lets it be printed, tested and iterated over, and nothing else. */
internal class Undefined(val what: String)

/** A tuple of Python. */
internal class TupleValue(val items: List<Any?>)

/** What `dict.items()`, `keys()` and `values()` give. */
internal class View(val kind: String, val items: List<Any?>)

/** What `range` gives. */
internal class RangeValue(val start: Long, val stop: Long, val step: Long) {
    val items: List<Long> = buildList {
        var at = start
        while (if (step > 0) at < stop else at > stop) {
            if (size == LARGEST) broken("a range of more than $LARGEST numbers")
            add(at)
            at = Math.addExact(at, step)
        }
    }

    private companion object {
        const val LARGEST = 100_000
    }
}

/** Items that are computed when they are asked for, once, as filters such as `map` give them. */
internal class Once(val items: Iterator<Any?>)

/** What `namespace` gives: variables that a loop can change for what follows it. */
internal class Namespace(val values: MutableMap<String, Any?>)

/** Text that the filter `safe` has marked. It can be printed; what else Jinja does with it is not known here. */
internal class SafeText(val text: String)

/** Something that can be called. */
internal class Callable(val name: String, val call: (Arguments) -> Any?)

/** Arguments of a call. */
internal class Arguments(val positional: List<Any?>, val named: Map<String, Any?> = emptyMap()) {
    /** The arguments in the order of [names], [ABSENT] where none is given; the first [required] of them must be there. */
    fun bind(of: String, required: Int, vararg names: String): List<Any?> {
        if (positional.size > names.size) broken("$of takes ${names.size} arguments, ${positional.size} are given")
        named.keys.find { it !in names.drop(positional.size) }?.let { broken("$of does not take the argument $it") }
        val found = names.mapIndexed { i, name -> if (i < positional.size) positional[i] else if (name in named) named[name] else ABSENT }
        if (found.take(required).any { it === ABSENT }) broken("$of needs $required arguments")
        return found
    }

    /** The arguments after the first [count]. */
    fun drop(count: Int) = Arguments(positional.drop(count), named)
}

/** Stands for an argument that is not given. */
internal val ABSENT = Any()

internal fun Any?.or(value: Any?) = if (this === ABSENT) value else this

/** The name of a value's type, for messages. */
internal fun typeOf(value: Any?): String = when (value) {
    null -> "none"
    is Boolean -> "a truth"
    is Number -> "a number"
    is String, is SafeText -> "text"
    is List<*> -> "a list"
    is Map<*, *> -> "a dict"
    is TupleValue -> "a tuple"
    is Undefined -> value.what
    else -> "a ${value::class.java.simpleName.lowercase()}"
}

internal fun truth(value: Any?): Boolean = when (value) {
    null, is Undefined -> false
    is Boolean -> value
    is Long -> value != 0L
    is Double -> value != 0.0
    is String -> value.isNotEmpty()
    is SafeText -> value.text.isNotEmpty()
    is List<*> -> value.isNotEmpty()
    is Map<*, *> -> value.isNotEmpty()
    is TupleValue -> value.items.isNotEmpty()
    is View -> value.items.isNotEmpty()
    is RangeValue -> value.items.isNotEmpty()
    is Loop -> value.length > 0
    else -> true
}

/** The items of what has a number of them, or null. */
internal fun Work.sized(value: Any?): List<Any?>? = when (value) {
    is String -> {
        items(value.length.toLong())
        points(value)
    }
    is List<*> -> value
    is Map<*, *> -> value.keys.toList()
    is TupleValue -> value.items
    is View -> value.items
    is RangeValue -> value.items
    is Undefined -> emptyList()
    else -> null
}

/** The items of what can be iterated over, or null. */
internal fun Work.iterator(value: Any?): Iterator<Any?>? = if (value is Once) value.items else sized(value)?.iterator()

internal fun Work.iterated(value: Any?): Iterator<Any?> = iterator(value) ?: broken("${typeOf(value)} has no items")

/** All items as a new list. */
internal fun Work.listed(value: Any?): List<Any?> {
    val found = ArrayList<Any?>()
    for (item in iterated(value)) {
        step()
        found += item
    }
    return found
}

/** A whole number, also where a truth stands for one, or null. */
internal fun whole(value: Any?): Long? = number(value) as? Long

/** A number, also where a truth stands for one, or null. */
internal fun number(value: Any?): Number? = when (value) {
    is Boolean -> if (value) 1L else 0L
    is Long, is Double -> value as Number
    else -> null
}

/** A key as a dict keeps it. */
internal fun key(value: Any?): Any? =
    if (value == null || value is String || value is Long) value else unknown("a key that is ${typeOf(value)}")
