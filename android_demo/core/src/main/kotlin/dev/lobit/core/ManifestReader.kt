package dev.lobit.core

import java.nio.ByteBuffer
import java.nio.charset.CharacterCodingException
import java.security.MessageDigest

/** Takes and refuses the same files as lobit's `Manifest.from_json`; `tests/golden/manifests` is for both. */
internal object ManifestReader {
    private const val MAJOR = 2
    private const val MINOR = 1
    private const val MOST_THREADS = 1024
    private const val LONGEST_PATH = 80
    private const val SEAL = "sha256"
    private const val AGAIN = "export the bundle again"
    private const val HEX = "0123456789abcdef"
    private val BEFORE_SEAL = ",\n  \"$SEAL\": \"".toByteArray()
    private val AFTER_SEAL = "\"\n}\n".toByteArray()
    private val VERSION = Regex("([0-9]{1,9})\\.([0-9]{1,9})")
    private val TABLE_BITS = listOf(4L, 8L, 16L, 32L)
    private val DTYPES = listOf("float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")

    fun read(data: ByteArray): Manifest {
        if (data.size > Manifest.LARGEST) throw tooLarge(data.size.toLong())
        val values = try {
            Json.parse(Charsets.UTF_8.newDecoder().decode(ByteBuffer.wrap(data)).toString().removePrefix("\uFEFF"))
        } catch (error: CharacterCodingException) {
            throw refusal(Reason.JSON, "manifest.json is not UTF-8: $AGAIN")
        } catch (error: Json.Problem) {
            throw refusal(Reason.JSON, "manifest.json is not JSON (${error.message}): $AGAIN")
        }
        val minor = minor((values as? Map<*, *>)?.get("schema_version"))
        val age = if (minor < MINOR) Fields.Age.OLDER else if (minor > MINOR) Fields.Age.NEWER else Fields.Age.SAME
        val manifest = try {
            Fields.of((values as Map<*, *>) - SEAL, Manifest.FILE_NAME, age) { manifest() }
        } catch (error: Fields.Wrong) {
            throw refusal(Reason.FIELDS, "${error.message}, $AGAIN")
        }
        manifest.files.forEach { checkPath(it.path) }
        val problems = problems(manifest) + stateProblems(manifest) + clientProblems(manifest)
        problems.firstOrNull()?.let { first ->
            val others = problems.count() - 1
            val more = if (others > 0) ", and $others more" else ""
            throw refusal(Reason.CONTRADICTION, "manifest.json contradicts itself ($first$more): $AGAIN")
        }
        if (!sealed(data)) throw refusal(Reason.SEAL, "manifest.json has changed, its bytes do not have the $SEAL at its end: $AGAIN")
        return manifest
    }

    fun tooLarge(size: Long) = refusal(Reason.JSON, "manifest.json has $size bytes, at most ${Manifest.LARGEST} are read: $AGAIN")

    private fun minor(version: Any?): Int {
        val told = (version as? String)?.let(VERSION::matchEntire)
        if (told == null || told.groupValues[1].toInt() != MAJOR) {
            val way = if ((told?.groupValues?.get(1)?.toInt() ?: 0) > MAJOR) "update this app" else AGAIN
            throw refusal(Reason.VERSION, "manifest.json has schema version ${shown(version)}, this app reads $MAJOR.x: $way")
        }
        return told.groupValues[2].toInt()
    }

    private fun Fields.manifest() = Manifest(
        text("name"), text("target"),
        fields("model") {
            ModelInfo(
                text("family"), count("parameters"), count("layers"), count("hidden_size"), count("vocab_size"), count("max_context"),
                count("largest_window"),
            )
        },
        map("recipe") { any(it) }, text("checkpoint_sha256"), size("context"), size("chunk"), size("threads"),
        map("options") { name -> plain(name, "a text, whole number or truth") { it is String || it is Boolean || Fields.isCount(it) } },
        list("methods") { fields(it) { Method(text("name"), text("role"), ports("inputs"), ports("outputs")) } },
        list("states") { fields(it) { state() } },
        later("client", null) { name -> any(name)?.let { fields(name) { clientInputs() } } },
        fields("cache") { CacheInfo(text("dtype"), counts("slots"), count("value_bytes"), count("scale_bytes")) },
        fields("tokens") {
            Tokens(countOrNull("bos"), counts("stop"), textOrNull("chat_template"), map("special") { name -> text(name) })
        },
        fields("generation") {
            Generation(numberOrNull("temperature"), countOrNull("top_k"), numberOrNull("top_p"), numberOrNull("repetition_penalty"))
        },
        fields("delegation") {
            Delegation(
                text("backend"), count("partitions"), map("delegated") { count(it) }, map("left") { count(it) },
                later("read_bytes", emptyMap()) { name -> map(name) { count(it) } },
            )
        },
        list("weights") { fields(it) { TensorGroup(text("kind"), text("format"), count("parameters"), count("bytes")) } },
        list("files") { fields(it) { FileEntry(text("path"), text("role"), count("bytes"), text("sha256")) } },
        map("versions") { text(it) }, text("schema_version"),
    )

    private fun Fields.counts(name: String) = list(name) { count(it) }

    private fun Fields.ports(name: String) = list(name) { entry ->
        fields(entry) {
            Port(
                text("name"), text("role"),
                list("shape") { axis -> plain(axis, "a text or whole number") { it is String || Fields.isCount(it) } }, text("dtype"),
            )
        }
    }

    private fun Fields.state() = State(
        text("input"), text("output"), text("dtype"), counts("shape"), countOrNull("axis"), countOrNull("window"), flag("in_place"),
        later("rows", false) { flag(it) },
    )

    private fun Fields.clientInputs() = ClientInputs(
        fields("embedding") { Lookup(text("port"), text("file"), count("bits"), number("factor")) },
        list("rotary") { fields(it) { Rotary(text("cos"), text("sin"), list("frequencies") { turn -> number(turn) }, number("factor")) } },
        list("masks") { fields(it) { Mask(text("port"), countOrNull("window"), number("hidden")) } },
        textOrNull("last"),
    )

    /** Refuses a path that leaves the bundle or is no usable name of a file. */
    fun checkPath(path: String) {
        val parts = path.split('/').filter { it.isNotEmpty() && it != "." }
        if (!printable(path) || path.codePointCount(0, path.length) > LONGEST_PATH) {
            throw refusal(Reason.PATH, "the bundle names ${shown(path)}, which is no usable name of a file: do not use this bundle")
        }
        if (parts.isEmpty() || path.startsWith("/") || ".." in parts || '\\' in path || ':' in path) {
            throw refusal(Reason.PATH, "the bundle names ${shown(path)}, which leaves the bundle: do not use this bundle")
        }
    }

    private fun problems(manifest: Manifest): Sequence<String> = sequence {
        val model = manifest.model
        val widths = listOf("layers" to model.layers, "hidden_size" to model.hiddenSize, "vocab_size" to model.vocabSize)
        for ((name, size) in widths + ("chunk" to manifest.chunk.toLong())) if (size < 1) yield("$name is $size")
        if (manifest.chunk > manifest.context || manifest.context > model.maxContext) {
            yield("chunk ${manifest.chunk}, context ${manifest.context} and the model's context ${model.maxContext} are not in this order")
        }
        val slots = manifest.cache.slots
        if (slots.size.toLong() != model.layers || slots.any { it !in 1..manifest.context }) {
            yield("the cache of ${slots.size} layers does not fit ${model.layers} layers and a context of ${manifest.context}")
        }
        if (manifest.threads > MOST_THREADS) yield("threads is ${manifest.threads}, over $MOST_THREADS")
        for (token in manifest.tokens.stop + listOfNotNull(manifest.tokens.bos)) {
            if (token >= model.vocabSize) yield("token $token is outside the vocabulary of ${model.vocabSize}")
        }
        for ((path, entries) in manifest.files.groupBy { it.path }) if (entries.size > 1) yield("$path is listed ${entries.size} times")
        val hashes = listOf("the checkpoint" to manifest.checkpointSha256) + manifest.files.map { it.path to it.sha256 }
        for ((name, hash) in hashes) if (hash.length != 64 || hash.any { it !in HEX }) yield("$name has the sha256 ${shown(hash)}")
    }

    private fun stateProblems(manifest: Manifest): Sequence<String> = sequence {
        val roles = manifest.methods.groupBy { it.role }
        for ((role, methods) in roles) if (methods.size > 1) yield("${methods.size} methods are for ${shown(role)}")
        val inputs = manifest.methods.flatMap { it.inputs }.map { it.name }.toSet()
        val outputs = manifest.methods.flatMap { it.outputs }.map { it.name }.toSet()
        for (state in manifest.states) {
            if (state.input !in inputs) yield("state ${shown(state.input)} is no input")
            if (state.output !in outputs) yield("state ${shown(state.output)} is no output")
            if (state.dtype !in DTYPES) yield("state ${shown(state.input)} has the type ${shown(state.dtype)}")
            val full = state.shape.isNotEmpty() && state.shape.all { it >= 1 }
            if (!full) yield("state ${shown(state.input)} has the shape ${shown(state.shape)}")
            val axis = state.axis ?: continue
            if (axis >= state.shape.size || state.shape[axis.toInt()] > manifest.context) {
                yield("state ${shown(state.input)} has its positions on axis $axis of ${shown(state.shape)}, context ${manifest.context}")
            }
        }
    }

    private fun clientProblems(manifest: Manifest): Sequence<String> = sequence {
        val client = manifest.client ?: return@sequence
        val inputs = manifest.methods.flatMap { it.inputs }.map { it.name }.toSet()
        val named = listOf(client.embedding.port) + client.rotary.flatMap { listOf(it.cos, it.sin) } + client.masks.map { it.port }
        for (name in named + listOfNotNull(client.last)) if (name !in inputs) yield("the client's input ${shown(name)} is no port")
        val file = client.embedding.file
        if (manifest.files.none { it.path == file }) yield("the embedding's file ${shown(file)} is none of the files")
        if (client.embedding.bits !in TABLE_BITS) yield("the embedding has ${client.embedding.bits} bits")
    }

    /** Whether the file ends with the sha256 of all bytes before that digest. */
    private fun sealed(data: ByteArray): Boolean {
        val start = data.size - AFTER_SEAL.size - 64
        val before = start - BEFORE_SEAL.size
        if (before < 0 || !data.copyOfRange(before, start).contentEquals(BEFORE_SEAL)) return false
        if (!data.copyOfRange(start + 64, data.size).contentEquals(AFTER_SEAL)) return false
        val digest = MessageDigest.getInstance("SHA-256").apply { update(data, 0, start) }.digest()
        return hexadecimal(digest) == String(data, start, 64, Charsets.ISO_8859_1)
    }
}

internal fun hexadecimal(bytes: ByteArray): String = bytes.joinToString("") { "%02x".format(java.util.Locale.ROOT, it) }

/** Whether all characters can be printed, as Python's `str.isprintable` judges it. */
internal fun printable(text: String): Boolean = text.codePoints().allMatch { printable(it) }

internal fun printable(point: Int): Boolean = point == ' '.code || when (Character.getType(point).toByte()) {
    Character.CONTROL, Character.FORMAT, Character.SURROGATE, Character.PRIVATE_USE, Character.UNASSIGNED, Character.LINE_SEPARATOR,
    Character.PARAGRAPH_SEPARATOR, Character.SPACE_SEPARATOR,
    -> false
    else -> true
}
