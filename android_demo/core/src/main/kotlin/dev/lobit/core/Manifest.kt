package dev.lobit.core

/** A file of the bundle. [role] is `program`, `weights`, `embedding`, `emulated`, `encodings`, `tokenizer` or `config`. */
data class FileEntry(val path: String, val role: String, val bytes: Long, val sha256: String)

/** An input or output of a method. Axes of [shape] are numbers (Long), or ranges such as `1..128`. */
data class Port(val name: String, val role: String, val shape: List<Any>, val dtype: String)

/** A function of the program. Those with role `step`, or `prefill` and `decode`, read tokens and give logits. */
data class Method(val name: String, val role: String, val inputs: List<Port>, val outputs: List<Port>)

/** A tensor that the client keeps from call to call for the program; with [rows] the program puts out the call's own entries alone. */
data class State(
    val input: String, val output: String, val dtype: String, val shape: List<Long>, val axis: Long?, val window: Long?,
    val inPlace: Boolean, val rows: Boolean,
)

/** A table of embeddings in [file], whose entries have so many [bits]; the client gives the rows of the tokens to [port]. */
data class Lookup(val port: String, val file: String, val bits: Long, val factor: Double)

/** A rotary embedding; the ports [cos] and [sin] take factor · cos(position · frequency) and factor · sin(position · frequency). */
data class Rotary(val cos: String, val sin: String, val frequencies: List<Double>, val factor: Double)

/** A mask: 0 where a token sees an entry, [hidden] where it does not. */
data class Mask(val port: String, val window: Long?, val hidden: Double)

/** What the client computes for every call; the port [last] chooses the token with logits. */
data class ClientInputs(val embedding: Lookup, val rotary: List<Rotary>, val masks: List<Mask>, val last: String?)

/** Size of the program's key-value cache; [slots] has the positions that each layer's cache holds. */
data class CacheInfo(val dtype: String, val slots: List<Long>, val valueBytes: Long, val scaleBytes: Long) {
    val bytes: Long get() = valueBytes + scaleBytes
}

/** What a client must know about the tokenizer. [special] has the texts of special tokens by names such as `bos_token`. */
data class Tokens(val bos: Long?, val stop: List<Long>, val chatTemplate: String?, val special: Map<String, String>)

/** How the model's authors sample tokens; null where they say nothing. */
data class Generation(val temperature: Double?, val topK: Long?, val topP: Double?, val repetitionPenalty: Double?)

/** Where the program's operators run: how many of each on [backend], and how many of each elsewhere. */
data class Delegation(
    val backend: String, val partitions: Long, val delegated: Map<String, Long>, val left: Map<String, Long>,
    /** Bytes that a call of each method reads from memory, as the backend's compiler expects. */
    val readBytes: Map<String, Long>,
)

/** The weights of one kind and format in the program. */
data class TensorGroup(val kind: String, val format: String, val parameters: Long, val bytes: Long)

/** The model that was exported. */
data class ModelInfo(
    val family: String, val parameters: Long, val layers: Long, val hiddenSize: Long, val vocabSize: Long, val maxContext: Long,
    val largestWindow: Long,
)

/** A bundle's `manifest.json`. What its fields mean is written in lobit's `runtime/manifest.py` and `runtime/manifest.schema.json`. */
data class Manifest(
    val name: String,
    val target: String,
    val model: ModelInfo,
    /** The quantization recipe as lobit wrote it; [recipeName] and [recipeSummary] are for people. */
    val recipe: Map<String, Any?>,
    val checkpointSha256: String,
    val context: Int,
    val chunk: Int,
    val threads: Int,
    val options: Map<String, Any>,
    val methods: List<Method>,
    val states: List<State>,
    /** Null where the program needs tokens and positions alone. */
    val client: ClientInputs?,
    val cache: CacheInfo,
    val tokens: Tokens,
    val generation: Generation,
    val delegation: Delegation,
    val weights: List<TensorGroup>,
    val files: List<FileEntry>,
    val versions: Map<String, String>,
    val schemaVersion: String,
) {
    val recipeName: String get() = recipe["name"] as? String ?: ""
    val recipeSummary: String get() = recipe["summary"] as? String ?: ""

    /** Bytes of the program's file and of its weights' file, where there is one. */
    val programBytes: Long get() = files.filter { it.role == "program" || it.role == "weights" }.sumOf { it.bytes }

    /** The first file of a role. */
    fun file(role: String): FileEntry = files.find { it.role == role } ?: throw lacking(role)

    /** The method of a role. */
    fun method(role: String): Method = methods.find { it.role == role } ?: throw lacking("method for $role")

    private fun lacking(what: String) = refusal(Reason.CONTRADICTION, "bundle $name has no $what: export it again")

    companion object {
        const val FILE_NAME = "manifest.json"

        /** Bytes that a manifest may have; a larger one is not read. */
        const val LARGEST = 8L shl 20

        /** Reads the bytes of manifest.json. Throws [LobitException] where lobit's own reader refuses them. */
        fun read(data: ByteArray): Manifest = ManifestReader.read(data)
    }
}
