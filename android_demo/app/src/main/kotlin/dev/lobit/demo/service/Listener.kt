package dev.lobit.demo.service

import android.net.LocalServerSocket
import android.net.LocalSocket
import android.system.ErrnoException
import android.system.Os
import android.system.OsConstants
import java.io.Closeable
import java.io.IOException
import java.io.InputStream
import java.io.OutputStream

/** A process of this phone that has connected. Closing it ends reads and writes that wait. */
interface Client : Closeable {
    /** The user that it runs as. Throws [IOException] where it has gone. */
    val uid: Int
    val input: InputStream
    val output: OutputStream
}

/** A place that processes of this phone connect to. Closing it ends [accept] and frees its name. */
interface Listener : Closeable {
    /** Waits for the next client. Throws [IOException] once it is closed. */
    fun accept(): Client
}

/** Listens on an abstract socket of this phone. Throws [IOException] where its name is taken. */
class LocalListener(name: String) : Listener {
    private val socket = LocalServerSocket(name)

    override fun accept(): Client = LocalClient(socket.accept())

    override fun close() {
        // Closing alone would leave the thread waiting, and the socket's name taken.
        try { Os.shutdown(socket.fileDescriptor, OsConstants.SHUT_RDWR) } catch (_: ErrnoException) { }
        socket.close()
    }
}

private class LocalClient(private val socket: LocalSocket) : Client {
    override val uid: Int get() = socket.peerCredentials.uid
    override val input: InputStream get() = socket.inputStream
    override val output: OutputStream get() = socket.outputStream

    override fun close() {
        try {
            socket.shutdownInput()
            socket.shutdownOutput()
        } catch (_: IOException) {
            // The other side has closed it before.
        }
        socket.close()
    }
}
