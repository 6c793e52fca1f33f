package dev.lobit.core

import java.io.File
import java.io.IOException
import java.io.InputStream
import java.security.MessageDigest

/** Told of work that takes long: bytes done, and bytes in all, or 0 while these are not known. It may throw in order to cancel. */
typealias Progress = (done: Long, total: Long) -> Unit

/**
 * What the app can run: names of targets, and releases of ExecuTorch whose programs its library loads.
 *
 * [backends] gives the names of the library's backends ([Runtime.backends]); it is asked where a bundle is for target `qnn`, which needs
 * [QNN_BACKEND], and may throw [LobitException].
 */
data class Supported(
    val targets: Set<String> = setOf("xnnpack"),
    val releases: Set<String> = setOf("1.5.1"),
    val backends: () -> List<String> = { emptyList() },
) {
    companion object {
        const val QNN = "qnn"
        const val QNN_BACKEND = "QnnBackend"
    }
}

/** A folder that `lobit export` wrote. */
class Bundle(val folder: File, val manifest: Manifest) {
    /** The first file that has a role. */
    fun file(role: String): File = File(folder, manifest.file(role).path)

    companion object {
        private const val EMULATED = "emulated"

        /**
         * Reads a bundle and checks that this app runs it and that its files are those that export wrote.
         *
         * Programs for an emulator (files of role `emulated`) may be absent, since no phone needs them; where they are there, they must be
         * those that export wrote too.
         *
         * Without [checkHashes] only presence and size of the files are compared. Throws [LobitException].
         */
        fun open(folder: File, checkHashes: Boolean = true, supported: Supported = Supported(), progress: Progress = { _, _ -> }): Bundle {
            val manifest = manifest(folder)
            checkRuns(manifest, supported)
            val total = manifest.files.fold(0.0) { sum, entry -> sum + entry.bytes }.toLong()
            var done = 0L
            for (entry in manifest.files) {
                val problem = problem(folder, entry, checkHashes) { progress(done + it, total) }
                if (problem != null) throw refusal(Reason.FILES, "bundle ${manifest.name} has changed ($problem): copy or export it again")
                done += entry.bytes
            }
            return Bundle(folder, manifest)
        }

        /** The manifest of a bundle, without a look at its other files. */
        fun manifest(folder: File): Manifest {
            val file = File(folder, Manifest.FILE_NAME)
            if (!file.isFile) {
                throw refusal(Reason.FILES, "${folder.name} is no bundle, it has no manifest.json: make one with `lobit export`")
            }
            if (file.length() > Manifest.LARGEST) throw ManifestReader.tooLarge(file.length())
            return try {
                Manifest.read(file.readBytes())
            } catch (error: IOException) {
                throw refusal(Reason.FILES, "manifest.json of ${folder.name} cannot be read (${error.message}): copy the bundle again")
            }
        }

        /** Refuses a bundle whose program this app does not run. */
        fun checkRuns(manifest: Manifest, supported: Supported) {
            if (manifest.target == Supported.QNN) {
                if (Supported.QNN_BACKEND !in supported.backends()) {
                    val told = "bundle ${manifest.name} is for target 'qnn', this app's library has no ${Supported.QNN_BACKEND}"
                    throw refusal(Reason.RUNTIME, "$told: build the app with the flavour for Qualcomm (android_demo/README.md)")
                }
            } else if (manifest.target !in supported.targets) {
                val targets = supported.targets.joinToString()
                val told = "bundle ${manifest.name} is for target ${shown(manifest.target)}, this app runs $targets"
                throw refusal(Reason.RUNTIME, "$told: export it for that")
            }
            val release = manifest.versions["executorch"]
            if (release !in supported.releases) {
                val releases = supported.releases.joinToString()
                val told = if (release == null) "does not say which ExecuTorch made it" else "was made by ExecuTorch ${shown(release)}"
                val needed = "this app runs programs of $releases: export it with such a release"
                throw refusal(Reason.RUNTIME, "bundle ${manifest.name} $told, $needed")
            }
        }

        /**
         * Unpacks a zip with a bundle's files at its top or in one folder, and opens the bundle, as [open] says.
         *
         * [into] appears only when all of it is there and checked; until then its files lie in a folder with `.partial` after its name.
         */
        fun unzip(stream: InputStream, into: File, supported: Supported = Supported(), progress: Progress = { _, _ -> }): Bundle =
            BundleZip(into, supported, progress).unpack(stream)

        private fun problem(folder: File, entry: FileEntry, checkHashes: Boolean, progress: (Long) -> Unit): String? {
            val file = File(folder, entry.path)
            return try {
                when {
                    !file.canonicalFile.startsWith(folder.canonicalFile) -> "${entry.path} is a link that leaves the bundle"
                    entry.role == EMULATED && !file.exists() -> null
                    !file.isFile -> "${entry.path} is missing"
                    file.length() != entry.bytes -> "${entry.path} has ${file.length()} bytes instead of ${entry.bytes}"
                    checkHashes && sha256(file, progress) != entry.sha256 -> "${entry.path} has changed, its sha256 is not the manifest's"
                    else -> null
                }
            } catch (error: IOException) {
                "${entry.path} cannot be read (${error.message})"
            }
        }

        private fun sha256(file: File, progress: (Long) -> Unit): String {
            val digest = MessageDigest.getInstance("SHA-256")
            file.inputStream().use { input ->
                input.forEachPiece { buffer, size, done ->
                    digest.update(buffer, 0, size)
                    progress(done)
                }
            }
            return hexadecimal(digest.digest())
        }
    }
}
