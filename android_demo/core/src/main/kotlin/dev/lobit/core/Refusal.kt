package dev.lobit.core

/** Why a bundle is refused; up to [SEAL] by its manifest alone. */
enum class Reason {
    /** manifest.json is not JSON, or is too large. */
    JSON,

    /** It has another major version of the schema. */
    VERSION,

    /** A field is missing, unknown or of the wrong type. */
    FIELDS,

    /** A file's path leaves the bundle. */
    PATH,

    /** Two fields contradict each other. */
    CONTRADICTION,

    /** The file's bytes do not have the sha256 at its end. */
    SEAL,

    /** A file is missing, changed, or a link that leaves the bundle. */
    FILES,

    /** The program is for another runtime than this app's. */
    RUNTIME,

    /** A zip file is damaged or is no bundle. */
    ARCHIVE,
}

/** The cause of a [LobitException] that refuses a bundle. */
class Refusal(val reason: Reason, message: String) : Exception(message)

/** Why a bundle was refused; null where the exception is about something else. */
val LobitException.reason: Reason? get() = (cause as? Refusal)?.reason

internal fun refusal(reason: Reason, message: String) = LobitException(message, Refusal(reason, message))

/** A name or value out of a bundle as a message shows it: quoted, never long, without control characters. */
internal fun shown(value: Any?): String {
    val text = value.toString()
    val short = if (text.length > LONGEST_SHOWN) text.take(LONGEST_SHOWN) + "…" else text
    val printed = short.map { if (it.isISOControl() || it.isSurrogate()) '?' else it }.joinToString("")
    return if (value is String) "'$printed'" else printed
}

private const val LONGEST_SHOWN = 60
